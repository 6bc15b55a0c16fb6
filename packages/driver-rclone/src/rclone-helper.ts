import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import {
  abortError,
  type ByteRange,
  type CallOptions,
  errorMessage,
  isVarveError,
  VarveError,
} from '@varve/core'
import { CatStream } from './cat-stream.ts'
import { parseLine, parseStat, type RemoteFile, readLines } from './lsjson.ts'
import { type FailedCommand, rcloneError, saysMissing, saysNoCommand } from './rclone-error.ts'
import { assertHelperOptions, type RcloneHelperOptions } from './rclone-options.ts'
import { type RcloneExit, RcloneProcess } from './rclone-process.ts'
import { assertVersion, parseVersion } from './rclone-version.ts'
import { baseEnvironment, parseBackends, redact, remoteVariables, secretsOf } from './remote-environment.ts'
import { parseUploads, type UnfinishedUpload } from './unfinished-uploads.ts'

const DEFAULT_TIMEOUT_MS = 60_000
/** The slowest copy within a server that is waited for, in bytes a second: some servers move by copying. */
const SLOWEST_COPY = 8 * 1024 * 1024
/** Less than any age, whatever the server's clock says. */
const ANY_AGE = '-8760h'
/** Bytes that wait to be taken by rclone before the source has to wait. */
const MOST_WAITING = 2 * 1024 * 1024

/** What a remote can do, as `rclone backend features` tells. */
export interface RemoteFeatures {
  /** It takes an upload whose size is not known. Without it rclone would spool the data to a local disk. */
  readonly streamingUpload: boolean
  /** Two files of one folder may have the same name, so an upload replaces nothing. */
  readonly duplicateNames: boolean
  /** It tells how much space is left. */
  readonly tellsSpace: boolean
  /** It may keep parts of uploads that never came to an end, as S3 does. */
  readonly keepsParts: boolean
}

/** Options of {@link RcloneHelper.rcat}. */
export interface RcatOptions extends CallOptions {
  /** The size in bytes, where it is known. */
  size?: number
  /** Called when rclone has taken a chunk. */
  onTaken?: (chunk: Uint8Array) => void
}

/** Options of {@link RcloneHelper.list}. */
export interface ListOptions extends CallOptions {
  /** Called when the folder is not there. */
  onMissing?: () => void
}

interface RunOptions extends CallOptions {
  /** Written to its standard input. */
  input?: string
  /** How long it may make no progress, in milliseconds. */
  idleMs?: number
  /** Without the remotes that are given in the options. */
  bare?: boolean
}

/**
 * rclone, for one remote: manages how the remote is known to rclone and runs its commands. Data goes by pipes, never
 * over a local disk, and secrets by the environment, never by the command line.
 *
 * Paths are those of rclone: relative to the remote's root unless they begin with `/`. Nothing is checked of
 * them; {@link RcloneDriver} keeps to its prefix.
 */
export class RcloneHelper {
  readonly #options: RcloneHelperOptions
  readonly #timeoutMs: number
  readonly #secrets: string[]
  #env: Promise<Record<string, string>> | undefined
  #features: Promise<RemoteFeatures> | undefined
  #versionIsRight = false

  /** @throws INVALID_CONFIG, which names the option */
  constructor(options: RcloneHelperOptions) {
    assertHelperOptions(options)
    this.#options = options
    this.#timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS
    this.#secrets = secretsOf(options)
  }

  /** A path as rclone wants it: `remote:path`. */
  target(path: string): string {
    return `${this.#options.remoteName}:${path}`
  }

  /**
   * Looks whether rclone is there and new enough, and returns its version.
   *
   * @throws COMMAND_MISSING; INVALID_CONFIG with both versions
   */
  async version(options: CallOptions = {}): Promise<string> {
    const { exit, stdout } = await this.#run(['version'], { ...options, bare: true })
    if (exit.exitCode !== 0) throw rcloneError(exit, { target: 'version' })
    const version = parseVersion(stdout)
    assertVersion(version)
    this.#versionIsRight = true
    return version
  }

  /** What the remote can do; asked for once. */
  async features(options: CallOptions = {}): Promise<RemoteFeatures> {
    this.#features ??= this.#readFeatures(options).catch(error => {
      this.#features = undefined // the next call asks again
      throw error
    })
    return this.#features
  }

  /**
   * Uploads what a source gives to a path. Resolves when rclone has ended well; when the source fails, or the signal
   * fires, rclone is killed, and has ended before this rejects. What is left at the path then is for the caller to
   * remove.
   *
   * @param open opens the source, which must end with an error when the signal that it is given fires
   * @throws UPLOAD_FAILED, TIMEOUT, ABORTED, and what the storage failed with; what the source throws is thrown as it is
   */
  async rcat(
    path: string,
    open: (signal: AbortSignal) => AsyncIterable<Uint8Array>,
    options: RcatOptions = {},
  ): Promise<void> {
    const { size, signal, onTaken } = options
    const target = this.target(path)
    const known = size === undefined ? [] : ['--size', String(size)]
    // no time limit within rclone: it would hold a slow source against the server
    const process = await this.#start(['rcat', ...known, '--timeout', '0', target], options, true)
    process.stdout.resume()
    try {
      await feed(process, open(process.ending), onTaken)
    } catch (error) {
      if (!process.ending.aborted) {
        process.stop(new VarveError('ABORTED', `The source failed: ${errorMessage(error)}`, { cause: error }))
        await process.exited
        throw error
      }
    }
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    if (signal?.aborted) throw abortError(signal)
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target, code: 'UPLOAD_FAILED' }, signal)
  }

  /** The bytes of a file from `start` to before `end`, all of which must be there. The stream fails otherwise. */
  async cat(path: string, range: ByteRange, options: CallOptions = {}): Promise<Readable> {
    const { start, end } = range
    if (start === end) return Readable.from([])
    const part = ['--offset', String(start), '--count', String(end - start)]
    const target = this.target(path)
    const process = await this.#start(['cat', ...part, '--timeout', '0', target], options, false)
    return new CatStream(process, {
      target,
      length: end - start,
      toError: exit => rcloneError(exit, { target }),
    })
  }

  /** The file at a path; undefined where there is none, or a folder. */
  async stat(path: string, options: CallOptions = {}): Promise<RemoteFile | undefined> {
    const target = this.target(path)
    const args = ['lsjson', '--stat', '--files-only', '--no-mimetype', '--use-server-modtime', target]
    const { exit, stdout } = await this.#run(args, options)
    if (saysMissing(exit)) return undefined
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
    return parseStat(stdout)
  }

  /**
   * All files in a folder and below it, as rclone finds them. A folder that is not there has none; where the path is a
   * file, that file is given by its last name, as if it were in a folder.
   */
  async *list(path: string, options: ListOptions = {}): AsyncGenerator<RemoteFile> {
    const target = this.target(path)
    const args = ['lsjson', '-R', '--files-only', '--no-mimetype', '--use-server-modtime', target]
    const process = await this.#start(args, options, false)
    try {
      for await (const line of readLines(process.stdout)) {
        process.watch.progress()
        const file = parseLine(line)
        if (!file) continue
        using _ = process.watch.hold() // while who reads the listing does something else
        yield file
        if (options.signal?.aborted) throw abortError(options.signal)
      }
    } finally {
      // it has printed all, or is not listened to any more
      if (!process.stdout.readableEnded) process.stop(new VarveError('ABORTED', 'The listing was left.'))
      await process.exited
    }
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    if (saysMissing(exit)) options.onMissing?.()
    else if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
  }

  /**
   * Whether a folder is there. In a bucket any is; it is the bucket that has to be there.
   *
   * @throws what the remote failed with, where it does not answer or refuses
   */
  async hasFolder(path: string, options: CallOptions = {}): Promise<boolean> {
    const target = this.target(path)
    const process = await this.#start(['lsf', '--max-depth', '1', target], options, false)
    for await (const _ of readLines(process.stdout)) {
      process.stop(new VarveError('ABORTED', 'The first name is enough.'))
      await process.exited
      return true
    }
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    if (saysMissing(exit)) return false
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
    return true
  }

  /** Makes a folder and those above it. */
  async makeFolder(path: string, options: CallOptions = {}): Promise<void> {
    await this.#must(['mkdir', this.target(path)], this.target(path), options)
  }

  /**
   * Moves a file to another path, and over what is there.
   *
   * @param size the file's, in bytes: a server that moves by copying gets time for it
   */
  async moveTo(from: string, to: string, size: number, options: CallOptions = {}): Promise<void> {
    const idleMs = this.#timeoutMs + (size / SLOWEST_COPY) * 1000
    const { duplicateNames } = await this.features(options)
    // Else rclone removes what is there before it moves, and takes two files of one size and time for the same.
    const over = duplicateNames ? '--ignore-times' : '--no-check-dest'
    const target = this.target(to)
    const move = (how: string) =>
      this.#run(['moveto', how, this.target(from), target], { ...options, idleMs })
    let { exit } = await move(over)
    // some servers rename over nothing: SFTP without its POSIX extension
    if (exit.exitCode !== 0 && over !== '--ignore-times' && !rcloneError(exit, { target }).retryable) {
      ;({ exit } = await move('--ignore-times'))
    }
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
  }

  /** Removes a file. False where there is none, or a folder. */
  async deleteFile(path: string, options: CallOptions = {}): Promise<boolean> {
    const target = this.target(path)
    const { exit } = await this.#run(['deletefile', target], options)
    if (saysMissing(exit)) return false
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
    return true
  }

  /** Uploads in parts below a folder that have not come to an end; none where the remote knows no such. */
  async unfinishedUploads(path: string, options: CallOptions = {}): Promise<UnfinishedUpload[]> {
    const { keepsParts } = await this.features(options)
    if (!keepsParts) return []
    const target = this.target(path)
    const { exit, stdout } = await this.#run(['backend', 'list-multipart-uploads', target], options)
    if (saysNoCommand(exit)) return []
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
    return parseUploads(stdout, path)
  }

  /** Removes what there is of uploads in parts to a path that have not come to an end, however young they are. */
  async removeParts(path: string, options: CallOptions = {}): Promise<void> {
    const { keepsParts } = await this.features(options)
    if (!keepsParts) return
    const target = this.target(path)
    const { exit } = await this.#run(['backend', 'cleanup', '-o', `max-age=${ANY_AGE}`, target], options)
    if (exit.exitCode !== 0 && !saysNoCommand(exit)) {
      throw await this.#explain(exit, { target }, options.signal)
    }
  }

  /** Bytes that can still be written, where the remote tells. */
  async freeBytes(path: string, options: CallOptions = {}): Promise<number | undefined> {
    const { tellsSpace } = await this.features(options)
    if (!tellsSpace) return undefined
    const { exit, stdout } = await this.#run(['about', '--json', this.target(path)], options)
    if (exit.exitCode !== 0) return undefined // the backend can, but this server does not: it is told as unknown
    const { free } = parseObject(stdout)
    return typeof free === 'number' ? free : undefined
  }

  async #readFeatures(options: CallOptions): Promise<RemoteFeatures> {
    const target = this.target('')
    const { Features } = parseObject(await this.#must(['backend', 'features', target], target, options))
    const has = (name: string) => (Features as Record<string, unknown> | undefined)?.[name] === true
    return {
      streamingUpload: has('PutStream'),
      duplicateNames: has('DuplicateFiles'),
      tellsSpace: has('About'),
      keepsParts: has('CleanUp'),
    }
  }

  async #must(args: string[], target: string, options: CallOptions): Promise<string> {
    const { exit, stdout } = await this.#run(args, options)
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target }, options.signal)
    return stdout
  }

  /** Runs a command to its end. */
  async #run(args: string[], options: RunOptions): Promise<{ exit: RcloneExit; stdout: string }> {
    const { input } = options
    const process = await this.#start(args, options, input !== undefined)
    process.stdin?.end(input)
    const output = text(process.stdout).catch(() => '') // destroyed when it is stopped
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    return { exit, stdout: await output }
  }

  async #start(args: string[], options: RunOptions, input: boolean): Promise<RcloneProcess> {
    const { signal, idleMs = this.#timeoutMs, bare = false } = options
    if (signal?.aborted) throw abortError(signal)
    const env = bare ? baseEnvironment(this.#options) : await this.#environment()
    return RcloneProcess.start([...args, ...this.#flags(args)], {
      command: this.#options.command ?? 'rclone',
      env,
      redact: text => redact(text, this.#secrets),
      idleMs,
      input,
      onCommand: this.#options.onCommand,
      signal,
    })
  }

  #flags(args: readonly string[]): string[] {
    const { remoteName, remotes = {}, configFile = remoteName in remotes ? '' : undefined } = this.#options
    const seconds = Math.ceil(this.#timeoutMs / 1000)
    return [
      ...(configFile === undefined ? [] : ['--config', configFile]),
      ...['--retries', '1', '--low-level-retries', '3', '--contimeout', `${seconds}s`],
      ...(args.includes('--timeout') ? [] : ['--timeout', `${seconds}s`]),
      ...['--stats', '0', '--ask-password=false'],
    ]
  }

  /** The environment with the given remotes; made once. */
  #environment(): Promise<Record<string, string>> {
    this.#env ??= this.#makeEnvironment().catch(error => {
      this.#env = undefined
      throw error
    })
    return this.#env
  }

  async #makeEnvironment(): Promise<Record<string, string>> {
    const env = baseEnvironment(this.#options)
    const { remotes = {} } = this.#options
    if (Object.keys(remotes).length === 0) return env
    const { exit, stdout } = await this.#run(['config', 'providers'], { bare: true })
    if (exit.exitCode !== 0) throw await this.#explain(exit, { target: 'providers' }, undefined)
    const variables = await remoteVariables(remotes, parseBackends(stdout), async password => {
      const { exit, stdout } = await this.#run(['obscure', '-'], { bare: true, input: password })
      if (exit.exitCode !== 0) throw rcloneError(exit, { target: 'a password' })
      const obscured = stdout.trim()
      this.#secrets.push(password, obscured) // anyone can turn it back
      return obscured
    })
    return { ...env, ...variables }
  }

  /** The error of a command that failed; that of an rclone which is too old where that is the reason. */
  async #explain(
    exit: RcloneExit,
    failed: FailedCommand,
    signal: AbortSignal | undefined,
  ): Promise<VarveError> {
    const error = rcloneError(exit, failed)
    if (this.#versionIsRight || error.code === 'COMMAND_MISSING') return error
    try {
      await this.version(signal ? { signal } : {})
      return error
    } catch (reason) {
      return isVarveError(reason, 'INVALID_CONFIG') ? reason : error
    }
  }
}

/** Writes chunks to an rclone, a few at once. Resolves when it has taken all of them, and has been told so. */
async function feed(
  { stdin, watch, exited }: RcloneProcess,
  chunks: AsyncIterable<Uint8Array>,
  onTaken: RcatOptions['onTaken'],
): Promise<void> {
  if (stdin === null) throw new TypeError('this rclone has no input')
  let waiting = 0
  let wake: (() => void) | undefined
  let held: Disposable | undefined = watch.hold()
  exited.then(() => wake?.())
  const taken = (chunk: Uint8Array, error: unknown) => {
    waiting -= chunk.byteLength
    watch.progress()
    if (waiting === 0) held = watch.hold() // it is up to the source now
    wake?.()
    if (!error) onTaken?.(chunk)
  }
  for await (const chunk of chunks) {
    waiting += chunk.byteLength
    held?.[Symbol.dispose]()
    held = undefined
    stdin.write(chunk, error => taken(chunk, error))
    while (waiting > MOST_WAITING && stdin.writable) {
      await new Promise<void>(resolve => {
        wake = resolve
      })
    }
  }
  held?.[Symbol.dispose]()
  stdin.end()
}

function parseObject(json: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(json)
    if (typeof value === 'object' && value !== null) return value as Record<string, unknown>
  } catch {
    // told below
  }
  throw new VarveError('STORAGE_FAILED', `rclone printed something that is no JSON: ${json.slice(0, 80)}`)
}
