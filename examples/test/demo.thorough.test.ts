import { expect, test } from 'vitest'
import { expectNothingLeft, runDemo } from './run-demo.ts'

test.each(['s3', 'sftp', 'ftp', 'rclone'])(
  'the demonstration with its backups on %s proves all that it says, and leaves nothing behind',
  async storage => {
    const { stdout, exitCode } = await runDemo('--image', '--storage', storage)
    expect(stdout.match(/PROVED {2}/g), stdout).toHaveLength(6)
    expect(exitCode).toBe(0)
    await expectNothingLeft()
  },
)

test('the demonstration of a guest on RBD images proves all that it says, and leaves nothing behind', async () => {
  const { stdout, exitCode } = await runDemo('--source', 'rbd')
  expect(stdout.match(/PROVED {2}/g), stdout).toHaveLength(7)
  expect(exitCode).toBe(0)
  await expectNothingLeft()
})
