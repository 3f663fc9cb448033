// What every client is asked to do, and how it reports: the same as in ../programs/trial.py.
import { readFileSync } from 'node:fs';

export const URL_ = process.env.GLM_URL;
export const BASE_URL = `${URL_}/v1`;
export const KEY = process.env.GLM_KEY;
export const MODEL = process.env.GLM_MODEL;
export const NO_MODEL = 'no-such-model';
export const PICTURE = readFileSync(process.env.GLM_PICTURE);
export const DATA_URL = `data:image/png;base64,${PICTURE.toString('base64')}`;
export const QUESTION = 'What color is the star?';
export const SECOND = 'How many shapes are there?';
export const TOOL = 'count_objects';
export const TOOL_TEXT = 'Count the objects of one color and shape.';
export const COLORS = ['red', 'blue', 'green'];
export const SHAPES = ['circle', 'star', 'square'];
export const TOOL_QUESTION = 'How many red circles are there? Use the tool.';
export const TOOL_RESULT = '2';

export function check(holds, what, given) {
  if (!holds) throw new Error(`${what}. Given: ${JSON.stringify(given)}`);
}
export const blue = (text) => check(text?.includes('blue'), 'the star is blue', text);
export const many = (pieces) => check(pieces.length > 1, 'a stream comes in pieces', pieces);
export const counted = (given) =>
  check(COLORS.includes(given.color) && SHAPES.includes(given.shape), 'arguments that fit their schema', given);
export const seen = (given) =>
  check(COLORS.includes(given.color) && typeof given.large === 'boolean', 'an answer in its form', given);
export const saysWhichModel = (error) => check(String(error.message).includes(NO_MODEL), 'the error names the model', String(error));

async function running() {
  const answer = await fetch(`${URL_}/metrics`, { headers: { authorization: `Bearer ${KEY}` } });
  const lines = (await answer.text()).split('\n').filter((line) => /^glm_num_requests_(running|waiting)/.test(line));
  return lines.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
}

export async function comesToRest() {
  const deadline = Date.now() + 10_000;
  while ((await running()) > 0) {
    check(Date.now() < deadline, 'the work for a client that has gone ends', 'it still runs after 10 s');
    await new Promise((done) => setTimeout(done, 50));
  }
}

export async function report(features) {
  const results = {};
  for (const [name, trial] of Object.entries(features)) {
    try {
      await trial();
      results[name] = 'yes';
    } catch (error) {
      console.error(error);
      results[name] = `${error.name}: ${error.message}`.slice(0, 400);
    }
  }
  console.log(JSON.stringify(results));
}
