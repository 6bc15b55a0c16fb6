import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, readFile, rm, rmdir, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { createQcow2, createRaw } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, onTestFinished, test, vi } from 'vitest'
import { exportDisk, stopExports } from '../src/qemu-nbd.ts'

let folder: string
const { PATH } = process.env
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-nbd-'))
})
afterEach(async () => {
  process.env.PATH = PATH
  vi.restoreAllMocks()
  await rm(folder, { recursive: true, force: true })
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

test('where there is no qemu-nbd the error names the package that has it', async () => {
  process.env.PATH = folder
  const options = {
    disk: 'vda',
    path: join(folder, 'vda'),
    format: 'qcow2',
    writable: false,
    folder,
  } as const
  await expect(exportDisk(options)).rejects.toMatchObject({
    code: 'COMMAND_MISSING',
    message: expect.stringContaining('qemu-nbd is not installed. Install it (Debian package qemu-utils)'),
  })
})

test('a path with the word "lock" in it does not make a missing image a locked one', async () => {
  const path = join(folder, 'block', 'vda.qcow2')
  const options = { disk: 'vda', path, format: 'qcow2', writable: false, folder } as const
  await expect(exportDisk(options)).rejects.toMatchObject({ code: 'NBD_SOCKET_MISSING' })
})

/** Serves an image as a run does that died since: a server that nobody here waits for. */
async function leaveServer(disk: string): Promise<number> {
  const path = join(folder, `${disk}.qcow2`)
  await createQcow2(path, 1024 * 1024)
  const [socket, pidFile] = [join(folder, `${disk}.sock`), join(folder, `${disk}.pid`)]
  const serve = ['qemu-nbd', '--fork', '--persistent', '--socket', socket, '--pid-file', pidFile, path]
  // Whoever waits for it meanwhile takes it away at once, so that it is no zombie.
  spawn('python3', ['-c', REAPER, ...serve], { stdio: 'ignore' })
  for (;;) {
    const pid = Number(await readFile(pidFile, 'utf8').catch(() => ''))
    if (pid > 0) return pid
    await sleep(10)
  }
}

/** Starts a program and waits for all that it leaves. PR_SET_CHILD_SUBREAPER of prctl(2) is 36. */
const REAPER = `
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
subprocess.run(sys.argv[1:])
try:
    while True: os.wait()
except ChildProcessError: pass
`

const isAlive = (pid: number) => existsSync(`/proc/${pid}`)

test('servers that a run left are ended, and their folder goes', async () => {
  const pids = [await leaveServer('vda'), await leaveServer('vdb')]
  await stopExports(folder, ['vda', 'vdb', 'vdc'])
  expect(pids.filter(isAlive)).toEqual([])
  expect(existsSync(folder)).toBe(false)
})

test('a server that ends by itself right before it is told to is none that cannot be ended', async () => {
  const pid = await leaveServer('vda')
  const { kill } = process
  const told = vi.spyOn(process, 'kill').mockImplementation((target, signal) => {
    if (isAlive(target)) kill.call(process, target, 'SIGKILL')
    while (isAlive(target)); // its last client has gone
    return kill.call(process, target, signal)
  })
  await stopExports(folder, ['vda'])
  expect(told).toHaveBeenCalledWith(pid, 'SIGTERM')
  expect(existsSync(folder)).toBe(false)
})

test('a server that does not end is told of in time, with its process, and is found again by the next try', async () => {
  const pids = [await leaveServer('vda'), await leaveServer('vdb')]
  const { kill } = process
  // No signal reaches a process that waits for storage which hangs.
  const told = vi.spyOn(process, 'kill').mockImplementation((target, signal) => {
    return target === pids[0] || kill.call(process, target, signal)
  })
  await expect(stopExports(folder, ['vda', 'vdb'], 600)).rejects.toMatchObject({
    code: 'NBD_FAILED',
    context: { disk: 'vda', pid: pids[0] },
    message: expect.stringContaining('varve recover'),
  })
  expect(told.mock.calls.filter(([pid]) => pid === pids[0])).toEqual([
    [pids[0], 'SIGTERM'],
    [pids[0], 'SIGKILL'],
  ])
  expect(pids.map(isAlive)).toEqual([true, false])
  told.mockRestore()
  await stopExports(folder, ['vda', 'vdb'])
  expect(pids.map(isAlive)).toEqual([false, false])
})

test('a server whose storage hangs is waited for no longer than is said, and is told of then', async () => {
  // On a file system that is frozen a write waits in the kernel, where no signal ends it.
  const [device, exports] = [join(folder, 'device'), join(folder, 'exports')]
  const mounted = await mkdtemp(join(tmpdir(), 'varve-frozen-'))
  onTestFinished(() => rmdir(mounted))
  await createRaw(device, 64 * 1024 * 1024)
  await execa('mkfs.ext4', ['-q', device])
  await mkdir(exports)
  await execa('mount', ['-o', 'loop', device, mounted])
  onTestFinished(async () => {
    await execa('fsfreeze', ['--unfreeze', mounted], { reject: false }) // it is, where the test went well
    await execa('umount', [mounted])
  })
  const path = join(mounted, 'vda')
  await createRaw(path, 1024 * 1024)
  const server = await exportDisk({ disk: 'vda', path, format: 'raw', writable: true, folder: exports })
  const pid = Number(await readFile(join(exports, 'vda.pid'), 'utf8'))
  await execa('fsfreeze', ['--freeze', mounted])
  const write = ['-f', 'raw', '-c', 'write 0 64k', `nbd+unix:///?socket=${server.socketPath}`]
  const writing = execa('qemu-io', write, { reject: false })
  while (!(await waitsInKernel(pid))) await sleep(10)
  await server.stop(200)
  expect(isAlive(pid)).toBe(true)
  await expect(stopExports(exports, ['vda'], 600)).rejects.toMatchObject({
    code: 'NBD_FAILED',
    context: { disk: 'vda', pid },
  })
  await execa('fsfreeze', ['--unfreeze', mounted])
  await writing
  await stopExports(exports, ['vda'])
  expect(isAlive(pid)).toBe(false)
})

/** Whether a thread of the process waits where no signal reaches it. */
async function waitsInKernel(pid: number): Promise<boolean> {
  const threads = await readdir(`/proc/${pid}/task`)
  const stats = await Promise.all(threads.map(thread => readFile(`/proc/${pid}/task/${thread}/stat`, 'utf8')))
  return stats.some(stat => /\) D /.test(stat))
}
