import { execa } from 'execa'
import { expect, test } from 'vitest'
import { orphansText } from '../src/commands/recover.ts'

test('the commands that remove orphans mean their images to a shell, whatever these are called', async () => {
  const image = `vms/it's $(true) "one"; two`
  const text = orphansText([
    { image, run: 'x' },
    { image, snapshot: 'varve-x', run: 'x' },
  ])
  const commands = text
    .split('\n')
    .filter(line => line.startsWith('  '))
    .join('\n')
  // A stand-in that prints what the shell gives to rbd.
  const { stdout } = await execa('bash', ['-c', `rbd() { printf '<%s>' "$@"; echo; }\n${commands}`])
  expect(stdout.split('\n')).toEqual([
    `<snap><purge><${image}>`,
    `<rm><${image}>`,
    `<snap><rm><${image}@varve-x>`,
  ])
})
