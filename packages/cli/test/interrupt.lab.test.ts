import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'

const root = fileURLToPath(new URL('../../../', import.meta.url))

let folder: string
let disk: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-interrupt-'))
  disk = join(folder, 'disk.qcow2')
  await mkdir(join(folder, 'nas'))
  const config = {
    storages: { nas: { type: 'local', path: join(folder, 'nas') } },
    stateDir: join(folder, 'state'),
  }
  await writeFile(join(folder, 'varve.config.json'), JSON.stringify(config))
  await createQcow2(disk, 64 * 1024 * 1024)
  await qemuIo(disk, 'qcow2', ['write -P 0x11 0 32M'])
})
afterEach(() => rm(folder, { recursive: true }))

async function bitmaps(): Promise<unknown> {
  const { stdout } = await execa('qemu-img', ['info', '--output=json', disk])
  return JSON.parse(stdout)['format-specific'].data.bitmaps
}

/**
 * Runs a throttled backup as a process of its own. Once the upload has begun the signal is sent to the whole
 * process group, as a terminal does: once, or again and again to the end.
 */
async function interruptedBackup(
  signal: NodeJS.Signals,
  times: 'once' | 'again and again',
): Promise<{ code: unknown; stderr: string }> {
  const args = [
    ...['--import', import.meta.resolve('tsx'), join(root, 'packages/cli/src/main.ts')],
    ...['backup', 'web-1', '--disk', `vda=${disk}`, '--bandwidth', '1M', '--verbose'],
    ...['--config', join(folder, 'varve.config.json')],
  ]
  const child = spawn(process.execPath, args, {
    detached: true, // a process group of its own
    stdio: ['ignore', 'ignore', 'pipe'],
    env: { ...process.env, TSX_TSCONFIG_PATH: join(root, 'tsconfig.json') },
  })
  let stderr = ''
  let again: NodeJS.Timeout | undefined
  const send = () => process.kill(-(child.pid ?? 0), signal)
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    const before = stderr
    stderr += chunk
    const shown = (text: string) => !before.includes(text) && stderr.includes(text)
    if (shown('Uploading vda')) send()
    if (times === 'once' || !shown('Stopping and cleaning up')) return
    send() // at once: the clean-up may be over in a moment
    again = setInterval(send, 50)
  })
  child.on('exit', () => clearInterval(again))
  const [code] = await once(child, 'close')
  return { code, stderr }
}

test.each([
  ['SIGINT', 'again and again', 'Ctrl-C'],
  ['SIGTERM', 'once', 'SIGTERM'],
  ['SIGHUP', 'once', 'SIGHUP'],
] as const)(
  '%s, sent %s during a backup, waits for the clean-up, which leaves nothing',
  async (signal, times, named) => {
    const before = await bitmaps()
    const { code, stderr } = await interruptedBackup(signal, times)
    expect(code, stderr).toBe(1)
    expect(stderr).toContain(`Error: Stopped by ${named}.\n  code: ABORTED`)
    if (times !== 'once') expect(stderr).toContain('Still cleaning up')
    expect(await readdir(join(folder, 'nas'))).toEqual([])
    expect(await readdir(join(folder, 'state', 'runs'))).toEqual([])
    expect(await bitmaps()).toEqual(before)
    expect((await execa('pgrep', ['-f', `qemu-nbd.*${folder}`], { reject: false })).stdout).toBe('')
  },
)
