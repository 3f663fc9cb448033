// openai (Node), chat completions; after `parse` the parsed message is sent back as it is.
import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import {
  BASE_URL, COLORS, DATA_URL, KEY, MODEL, NO_MODEL, QUESTION, SECOND, SHAPES, TOOL, TOOL_QUESTION, TOOL_RESULT, TOOL_TEXT, blue,
  check, comesToRest, counted, many, report, saysWhichModel, seen,
} from './trial.mjs';

const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const Seen = z.object({ color: z.enum(COLORS), large: z.boolean() });
const parameters = {
  type: 'object', properties: { color: { type: 'string', enum: COLORS }, shape: { type: 'string', enum: SHAPES } },
  required: ['color', 'shape'],
};
const tools = [{ type: 'function', function: { name: TOOL, description: TOOL_TEXT, parameters } }];
const asking = (text = QUESTION) => [
  { role: 'user', content: [{ type: 'image_url', image_url: { url: DATA_URL } }, { type: 'text', text }] },
];
const ask = async (messages, fields = {}) =>
  (await client.chat.completions.create({ model: MODEL, messages, ...fields })).choices[0].message;

await report({
  async picture() {
    blue((await ask(asking())).content);
  },
  async stream() {
    const pieces = [];
    const stream = client.chat.completions.stream({ model: MODEL, messages: asking() });
    stream.on('content', (delta) => pieces.push(delta));
    const content = await stream.finalContent();
    many(pieces);
    blue(pieces.join(''));
    check(content === pieces.join(''), 'the pieces make the answer', content);
  },
  async tools() {
    const messages = asking(TOOL_QUESTION);
    const message = await ask(messages, { tools, tool_choice: { type: 'function', function: { name: TOOL } } });
    counted(JSON.parse(message.tool_calls[0].function.arguments));
    messages.push(message, ...message.tool_calls.map((call) => ({ role: 'tool', tool_call_id: call.id, content: TOOL_RESULT })));
    check((await ask(messages, { tools })).content, 'an answer after the result', '');
  },
  async schema() {
    const messages = asking();
    const completion = await client.chat.completions.parse({ model: MODEL, messages, response_format: zodResponseFormat(Seen, 'seen') });
    seen(completion.choices[0].message.parsed);
    messages.push(completion.choices[0].message, ...asking(SECOND));
    check((await ask(messages)).content, 'an answer after the parsed one', '');
  },
  async error() {
    try {
      await client.chat.completions.create({ model: NO_MODEL, messages: asking() });
    } catch (error) {
      check(error instanceof OpenAI.NotFoundError, 'its own class of error', error.name);
      return saysWhichModel(error);
    }
    throw new Error('no error');
  },
  async abort() {
    const stream = await client.chat.completions.create({ model: MODEL, messages: asking(), stream: true, ignore_eos: true });
    for await (const _ of stream) break;
    stream.controller.abort();
    await comesToRest();
  },
  async 'second turn'() {
    const messages = asking();
    messages.push(await ask(messages), ...asking(SECOND));
    check((await ask(messages)).content, 'a second answer', '');
  },
});
