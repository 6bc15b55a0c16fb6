import { expect, test } from 'vitest'
import { expectNothingLeft, runDemo } from './run-demo.ts'

const IN_GUEST = [
  'the restored vda has the SHA-256 from before its backup',
  "the restored vdb is exactly the guest's first",
  'of the stored chain and Varve restore the same: qemu-img compare',
  'the 3 backups of the chain are whole: every byte has its BLAKE3 digest',
  'the restored guest boots, and reads vda with the same SHA-256 as before its backup, and vdb as well',
  'files pass sha256sum -c, and',
  'after a restore the chain goes on, and no overlay, bitmap, snapshot or journal is left over',
]

test('the demonstration of a guest proves all that it says, and leaves nothing behind', async () => {
  const { stdout, exitCode } = await runDemo()
  expect(exitCode, stdout).toBe(0)
  const proofs = stdout.split('\n').filter(line => line.includes('PROVED  '))
  for (const proof of IN_GUEST) expect(proofs.join('\n')).toContain(proof)
  expect(proofs).toHaveLength(IN_GUEST.length)
  await expectNothingLeft()
})

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
