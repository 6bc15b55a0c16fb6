import { access, readFile } from 'node:fs/promises'
import { expect, test } from 'vitest'

const read = (path: string) => readFile(new URL(`../../${path}`, import.meta.url), 'utf8')

test('the example in the README is the quickstart that the tests run', async () => {
  const [, example] = /```ts\n([\s\S]*?)```/.exec(await read('README.md')) ?? []
  expect(example).toBe(await read('examples/quickstart/quickstart.ts'))
})

test.each([
  'README.md',
  'examples/README.md',
  'docs/architecture.md',
  'docs/embedding.md',
  'docs/troubleshooting.md',
  'docs/restoring-without-varve.md',
])('every relative link of %s leads to a file', async file => {
  const text = await read(file)
  const links = [...text.matchAll(/\]\((?!https?:|#)([^)#]+)/g)].map(([, link]) => link ?? '')
  for (const link of links) {
    await expect(
      access(new URL(link, new URL(`../../${file}`, import.meta.url))),
      link,
    ).resolves.toBeUndefined()
  }
})
