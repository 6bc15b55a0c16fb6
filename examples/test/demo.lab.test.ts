import { expect, test } from 'vitest'
import { expectNothingLeft, runDemo } from './run-demo.ts'

// The demonstration of a guest takes a minute and does what other tests do in pieces: it is in demo.thorough.test.ts.
test('the demonstration on disk images proves all that it says, and leaves nothing behind', async () => {
  const { stdout, exitCode } = await runDemo('--image')
  expect(stdout.match(/PROVED {2}/g), stdout).toHaveLength(6)
  expect(exitCode).toBe(0)
  await expectNothingLeft()
})

test('the demonstration that is stopped in the middle of a backup leaves nothing behind', async () => {
  const running = runDemo('--image')
  for await (const line of running) {
    if (String(line).includes('Full backup')) running.kill('SIGINT')
  }
  const { stdout, exitCode } = await running
  expect(stdout).toContain('Stopped. Nothing is left behind.')
  expect(exitCode).toBe(130)
  await expectNothingLeft()
})
