import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { exportDisk } from '../src/qemu-nbd.ts'

let folder: string
const { PATH } = process.env
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-nbd-'))
})
afterEach(async () => {
  process.env.PATH = PATH
  await rm(folder, { recursive: true })
})

test('without the driver of RBD images the error names the package that has it', async () => {
  // The drivers are modules of QEMU's, which this one does not see.
  const script = `#!/bin/bash\nPATH=\${PATH#*:}\nexec unshare --mount bash -c 'for modules in /usr/lib/*/qemu; do mount -t tmpfs none $modules; done; exec "$@"' bash qemu-nbd "$@"\n`
  await writeFile(join(folder, 'qemu-nbd'), script, { mode: 0o755 })
  process.env.PATH = `${folder}:${PATH}`
  const options = { disk: 'vda', path: 'rbd:vms/web-1', format: 'raw', writable: true, folder } as const
  await expect(exportDisk(options)).rejects.toMatchObject({
    code: 'NBD_SOCKET_MISSING',
    message: expect.stringContaining('install it (Debian package qemu-block-extra)'),
  })
})

test('a path with the word "lock" in it does not make a missing image a locked one', async () => {
  const path = join(folder, 'block', 'vda.qcow2')
  const options = { disk: 'vda', path, format: 'qcow2', writable: false, folder } as const
  await expect(exportDisk(options)).rejects.toMatchObject({ code: 'NBD_SOCKET_MISSING' })
})
