import { globSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import ts from 'typescript'
import { expect, test } from 'vitest'

// Built for Node 22, a `using` keeps the error of its block in a variable of the whole function. In a loop the next
// turn finds it there, and throws it again though nothing failed any more.

const root = fileURLToPath(new URL('../../../', import.meta.url))

test('no resource is declared in a loop of the code that is built', () => {
  const files = globSync('packages/*/src/**/*.ts', { cwd: root })
  expect(files.length).toBeGreaterThan(100)
  const found = files.flatMap(file =>
    usingInLoops(readFileSync(`${root}${file}`, 'utf8')).map(line => `${file}:${line}`),
  )
  expect(found, 'give the body of the loop a function of its own').toEqual([])
})

test.each([
  ['for (;;) { using a = b() }', 1],
  ['for (const x of xs) { try { await using a = b() } catch {} }', 1],
  ['for (const x in xs) { if (x) { using a = b(); using c = d() } }', 2],
  ['while (x) { switch (x) { case 1: { using a = b() } } }', 1],
  ['do { using a = b() } while (x)', 1],
  ['for (using a of xs) {}', 1],
  ['const f = async () => { for (;;) { using a = b() } }', 1],
  ['for (;;) { const f = () => { using a = b() } }', 0],
  ['for (;;) { class A { m() { using a = b() } } }', 0],
  ['{ using a = b(); for (;;) { const c = d() } }', 0],
])('%s holds %i of them', (code, count) => {
  expect(usingInLoops(code)).toHaveLength(count)
})

/** The lines of the `using` declarations that are in a loop of their own function. */
function usingInLoops(code: string): number[] {
  if (!/\busing\b/.test(code)) return []
  const source = ts.createSourceFile('code.ts', code, ts.ScriptTarget.Latest)
  const lines: number[] = []
  const visit = (node: ts.Node, inLoop: boolean) => {
    if (inLoop && ts.isVariableDeclarationList(node) && isUsing(node)) {
      lines.push(source.getLineAndCharacterOfPosition(node.getStart(source)).line + 1)
    }
    const within = ts.isIterationStatement(node, false) || (inLoop && !ts.isFunctionLike(node))
    ts.forEachChild(node, child => visit(child, within))
  }
  visit(source, false)
  return lines
}

function isUsing({ flags }: ts.Node): boolean {
  // `await using` has the bit of `using` and another one; `const` and `let` have other ones alone
  const kind = flags & ts.NodeFlags.BlockScoped
  return kind === ts.NodeFlags.Using || kind === ts.NodeFlags.AwaitUsing
}
