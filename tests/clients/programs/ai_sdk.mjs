// The AI SDK with its provider for compatible servers, or with its provider for Anthropic's messages: `ai_sdk.mjs anthropic`.
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';
import {
  BASE_URL, COLORS, KEY, MODEL, NO_MODEL, PICTURE, QUESTION, SECOND, SHAPES, TOOL, TOOL_QUESTION, TOOL_RESULT, TOOL_TEXT, blue, check,
  comesToRest, counted, many, report, saysWhichModel, seen,
} from './trial.mjs';

const endless = (url, options) => {
  const body = JSON.parse(options.body);
  return fetch(url, { ...options, body: JSON.stringify({ ...body, ignore_eos: true }) });
};
const provider = (fields = {}) =>
  process.argv[2] === 'anthropic'
    ? createAnthropic({ baseURL: BASE_URL, apiKey: KEY, ...fields })
    : createOpenAICompatible({ name: 'glm', baseURL: BASE_URL, apiKey: KEY, supportsStructuredOutputs: true, ...fields });
const model = provider()(MODEL);
const Seen = z.object({ color: z.enum(COLORS), large: z.boolean() });
const asking = (text = QUESTION) => [
  { role: 'user', content: [{ type: 'image', image: PICTURE, mediaType: 'image/png' }, { type: 'text', text }] },
];

await report({
  async picture() {
    blue((await generateText({ model, messages: asking(), maxRetries: 0 })).text);
  },
  async stream() {
    const pieces = [];
    for await (const piece of streamText({ model, messages: asking(), maxRetries: 0 }).textStream) pieces.push(piece);
    many(pieces);
    blue(pieces.join(''));
  },
  async tools() {
    const calls = [];
    const count = tool({
      description: TOOL_TEXT,
      inputSchema: z.object({ color: z.enum(COLORS), shape: z.enum(SHAPES) }),
      execute: async (given) => (calls.push(given), TOOL_RESULT),
    });
    const result = await generateText({
      model, messages: asking(TOOL_QUESTION), tools: { [TOOL]: count }, maxRetries: 0, stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: 'tool', toolName: TOOL } : 'auto' }),
    });
    counted(calls[0]);
    check(result.steps.length === 2, 'a step after the result', result.steps.length);
  },
  async schema() {
    const { output } = await generateText({ model, messages: asking(), maxRetries: 0, output: Output.object({ schema: Seen }) });
    seen(output);
  },
  async error() {
    try {
      await generateText({ model: provider()(NO_MODEL), messages: asking(), maxRetries: 0 });
    } catch (error) {
      check(error.statusCode === 404, 'the status', error.statusCode);
      return saysWhichModel(error);
    }
    throw new Error('no error');
  },
  async abort() {
    const control = new AbortController();
    const result = streamText({
      model: provider({ fetch: endless })(MODEL), messages: asking(), maxRetries: 0, abortSignal: control.signal, maxOutputTokens: 4000,
      onError() {},
    });
    for await (const _ of result.textStream) break;
    control.abort();
    await comesToRest();
  },
  async 'second turn'() {
    const messages = asking();
    const first = await generateText({ model, messages, maxRetries: 0 });
    messages.push(...first.response.messages, ...asking(SECOND));
    check((await generateText({ model, messages, maxRetries: 0 })).text, 'a second answer', '');
  },
});
