import { randomBytes } from 'node:crypto'
import { mkdir, readdir, readFile, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { execa } from 'execa'
import { missingCommand } from './command.ts'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import { saysLocked } from './image-lock.ts'
import { emit, type RunOptions } from './run-options.ts'
import { inTemporaryFolder } from './state-folder.ts'

const SOCKET_TIMEOUT_MS = 15_000
/** How long a server may take to end, in milliseconds. After a third of it, it is killed. */
const END_TIMEOUT_MS = 15_000
/** How long {@link NbdExport.stop} waits for that: longer, as what was written is on the way to the disk then. */
const STOP_TIMEOUT_MS = 30_000

/**
 * Of glibc's allocator, see mallopt(3): qemu-nbd allocates a buffer for each request, and by default has the
 * kernel map and zero new pages for each. With thresholds above the largest request it uses its memory again,
 * which about doubles its rate.
 */
const KEEP_MEMORY = {
  MALLOC_MMAP_THRESHOLD_: String(32 * 1024 * 1024),
  MALLOC_TRIM_THRESHOLD_: String(256 * 1024 * 1024),
}

/** What to export. */
export interface ExportOptions extends RunOptions {
  /** The disk's name; also that of the socket. */
  disk: string
  /** Image file or block device. */
  path: string
  format: 'qcow2' | 'raw'
  /** Whether clients may write. */
  writable: boolean
  /**
   * Keeps QEMU's programs from opening the disk for writing as long as it is served, and is refused where one has.
   * QEMU does so for every qcow2 image that it reads, but not for raw ones. Default: false.
   */
  refuseWriters?: boolean
  /** The bitmap to show as `qemu:dirty-bitmap:<name>`. */
  bitmap?: string
  /** A private folder for the socket and the process id; see {@link stopExports}. */
  folder: string
}

/** A running `qemu-nbd`. */
export interface NbdExport extends AsyncDisposable {
  readonly socketPath: string
  /** Aborted when it ends without having been told to, with NBD_FAILED as the reason. */
  readonly died: AbortSignal
  /**
   * Ends it, and tells of it in a `command` event. One that does not end in the time, as while the storage below its disk
   * hangs, is left to {@link stopExports}, which tells of it.
   */
  stop(timeoutMs?: number): Promise<void>
}

/**
 * A name for the private folder of a run's sockets: it is in the journal before the folder is made. Short, as the
 * path of a socket has at most 107 bytes.
 */
export function newExportFolder(): string {
  return join(tmpdir(), `varve-nbd-${randomBytes(6).toString('hex')}`)
}

/** Makes that folder. @throws STATE_DIR_FAILED */
export async function makeExportFolder(folder: string): Promise<void> {
  await inTemporaryFolder(folder, () => mkdir(folder, { mode: 0o700 }))
}

/**
 * Serves one disk on a Unix socket of its own. The process ends by itself when its last client has gone, so
 * that it does not outlive a run that died.
 *
 * @throws DISK_BUSY where another of QEMU's programs keeps the disk from being opened
 * @throws NBD_SOCKET_MISSING with what qemu-nbd said
 * @throws COMMAND_MISSING where there is none
 */
export async function exportDisk(options: ExportOptions): Promise<NbdExport> {
  const { disk, path, format, writable, bitmap, folder, refuseWriters = false } = options
  const socketPath = join(folder, `${disk}.sock`)
  const pidFile = join(folder, `${disk}.pid`)
  const args = [
    ...['--socket', socketPath, '--pid-file', pidFile],
    ...(writable ? ['--discard', 'unmap'] : ['--read-only', '--shared', '8']),
    ...(bitmap === undefined ? [] : ['--bitmap', bitmap]),
    ...(refuseWriters && format === 'raw' ? [await rawWithoutWriters(path)] : ['--format', format, path]),
  ]
  const startedAt = performance.now()
  const child = execa('qemu-nbd', args, {
    stdin: 'ignore',
    stdout: 'ignore',
    env: { LC_ALL: 'C', ...KEEP_MEMORY },
    reject: false,
    detached: true, // a Ctrl-C in the terminal is for Varve, which ends it when it is done with it
    maxBuffer: 1024 * 1024,
    forceKillAfterDelay: 5_000,
  })
  let stopping = false
  const died = new AbortController()
  const ended = child.then(result => {
    emit(options, {
      type: 'command',
      command: 'qemu-nbd',
      args,
      exitCode: stopping && result.isTerminated ? 0 : result.exitCode,
      stdout: '',
      stderr: result.stderr,
      durationMs: Math.round(performance.now() - startedAt),
    })
    if (!stopping) died.abort(diedError(options, result))
    return result
  })
  const stop = async (timeoutMs = STOP_TIMEOUT_MS) => {
    stopping = true
    child.kill('SIGTERM')
    const waiting = new AbortController()
    const late = sleep(timeoutMs, 'late', { signal: waiting.signal }).catch(() => 'late')
    if ((await Promise.race([ended, late])) === 'late') return
    waiting.abort()
    await Promise.all([rm(socketPath, { force: true }), rm(pidFile, { force: true })])
  }

  try {
    // The socket file is there before it listens; the process id is written after.
    for (let alive = true; !(await isWritten(pidFile)); ) {
      if (!alive) {
        const { code, stderr, shortMessage } = await ended
        if (code === 'ENOENT') throw missingCommand('qemu-nbd', { context: { disk, path } })
        throw new Error(stderr.trim() || shortMessage)
      }
      if (performance.now() - startedAt > SOCKET_TIMEOUT_MS)
        throw new Error(`none after ${SOCKET_TIMEOUT_MS / 1000} s`)
      if (options.signal?.aborted) throw abortError(options.signal)
      alive = await Promise.race([ended.then(() => false), sleep(10).then(() => true)])
    }
  } catch (error) {
    await stop()
    if (options.signal?.aborted || isVarveError(error, 'COMMAND_MISSING')) throw error
    if (saysLocked(errorMessage(error))) {
      throw new VarveError(
        'DISK_BUSY',
        `The disk ${disk} (${path}) was opened by a virtual machine or another program. Stop that, or back the machine up by its libvirt name while it runs.`,
        { context: { disk, path }, cause: error, retryable: true },
      )
    }
    const remedy = errorMessage(error).includes("Unknown protocol 'rbd'")
      ? "QEMU's driver of RBD images is not installed: install it (Debian package qemu-block-extra) and try again."
      : 'Check that the image is there, whole and readable, and that no other process writes to it.'
    throw new VarveError(
      'NBD_SOCKET_MISSING',
      `NBD socket did not appear: qemu-nbd could not serve ${path}: ${errorMessage(error)}. ${remedy}`,
      {
        context: { disk, path },
        cause: error,
      },
    )
  }
  return { socketPath, died: died.signal, stop, [Symbol.asyncDispose]: () => stop() }
}

/**
 * A raw disk as QEMU's block layer opens it when nobody else may write to it: the filter `blkdebug` is the one that
 * takes such a permission for any disk ("QMP Reference Manual", BlockdevOptionsBlkdebug). It injects nothing here.
 */
async function rawWithoutWriters(path: string): Promise<string> {
  const driver = (await stat(path)).isBlockDevice() ? 'host_device' : 'file'
  const filter = {
    driver: 'blkdebug',
    image: { driver, filename: path },
    'unshare-child-perms': ['write'],
  }
  return `json:${JSON.stringify({ driver: 'raw', file: filter })}`
}

function diedError(
  { disk, path }: ExportOptions,
  { exitCode, signal, stderr }: { exitCode?: number; signal?: string; stderr: string },
): VarveError {
  const how = signal === undefined ? `with exit code ${exitCode}` : `by ${signal}`
  const said = stderr.trim() ? `: ${stderr.trim()}` : ''
  return new VarveError(
    'NBD_FAILED',
    `The disk ${disk} is served no more: the qemu-nbd of ${path} ended ${how}${said}. See in the system's log what ended it, such as a lack of memory, and try again.`,
    { context: { disk, path, exitCode, signal, stderr }, retryable: true },
  )
}

/**
 * Ends every `qemu-nbd` that a run which died left with its socket in `folder`, and removes the folder.
 *
 * @throws NBD_FAILED where one does not end, as while the storage below its disk hangs; the folder then stays
 */
export async function stopExports(
  folder: string,
  disks: readonly string[],
  timeoutMs: number = END_TIMEOUT_MS,
): Promise<void> {
  const ends = await Promise.allSettled(disks.map(disk => endServer(folder, disk, timeoutMs)))
  const failed = ends.find(end => end.status === 'rejected')
  if (failed) throw failed.reason
  await rm(folder, { recursive: true, force: true }).catch(error => {
    throw new VarveError(
      'NBD_FAILED',
      `The folder ${folder} of a qemu-nbd that has ended cannot be removed: ${errorMessage(error)}. Remove it, then run "varve recover".`,
      { context: { folder }, cause: error },
    )
  })
}

async function endServer(folder: string, disk: string, timeoutMs: number): Promise<void> {
  const pid = Number(await readFile(join(folder, `${disk}.pid`), 'utf8').catch(() => ''))
  if (!Number.isSafeInteger(pid) || pid <= 1) return
  const isThere = () => runsWith(pid, join(folder, `${disk}.sock`))
  if (!(await isThere())) return
  const startedAt = performance.now()
  send(pid, 'SIGTERM')
  for (let killed = false; await isThere(); await sleep(20)) {
    const waited = performance.now() - startedAt
    if (waited > timeoutMs) throw endlessServer(disk, pid)
    if (killed || waited < timeoutMs / 3) continue
    killed = true
    send(pid, 'SIGKILL')
  }
}

/** It ends by itself with its last client, so it may be gone by now. */
function send(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal)
  } catch (error) {
    if (!(error instanceof Error && 'code' in error && error.code === 'ESRCH')) throw error
  }
}

function endlessServer(disk: string, pid: number): VarveError {
  return new VarveError(
    'NBD_FAILED',
    `The qemu-nbd of the disk ${disk} (process ${pid}) does not end, not even by SIGKILL: the storage below the disk hangs. See that it answers again, then run "varve recover".`,
    { context: { disk, pid }, retryable: true },
  )
}

/** Whether the process is still the one that was started with this argument: process ids are used again. */
async function runsWith(pid: number, argument: string): Promise<boolean> {
  const commandLine = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '')
  return commandLine.split('\0').includes(argument) || (commandLine === '' && (await isDying(pid)))
}

/**
 * Whether the process is a killed `qemu-nbd` of which a thread waits in the kernel still: it has no command line any more,
 * but what that thread was writing is yet to come.
 */
async function isDying(pid: number): Promise<boolean> {
  const comm = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '')
  if (comm !== 'qemu-nbd\n') return false
  const threads = await readdir(`/proc/${pid}/task`).catch(() => [])
  const stats = threads.map(thread => readFile(`/proc/${pid}/task/${thread}/stat`, 'utf8').catch(() => ''))
  return (await Promise.all(stats)).some(stat => stat !== '' && !/\) [ZX] /.test(stat))
}

async function isWritten(path: string): Promise<boolean> {
  return stat(path).then(
    ({ size }) => size > 0,
    () => false,
  )
}
