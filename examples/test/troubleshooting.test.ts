import { readFile } from 'node:fs/promises'
import { expect, test } from 'vitest'

const read = (path: string) => readFile(new URL(`../../${path}`, import.meta.url), 'utf8')

test('docs/troubleshooting.md has a section for every error code, in their order, and for nothing else', async () => {
  const union = /export type ErrorCode =([\s\S]*?)\n\n/.exec(await read('packages/core/src/errors.ts'))?.[1]
  const codes = [...(union ?? '').matchAll(/\| '([A-Z_]+)'/g)].map(([, code]) => code)
  const sections = (await read('docs/troubleshooting.md')).split(/^### /m).slice(1)
  const titles = sections.map(section => section.split('\n', 1)[0])
  expect(codes.length).toBeGreaterThan(30)
  expect(titles).toEqual(codes)
  for (const section of sections)
    expect(section).toMatch(/\*\*What happened\.\*\* [\s\S]+\*\*What to do\.\*\* /)
})
