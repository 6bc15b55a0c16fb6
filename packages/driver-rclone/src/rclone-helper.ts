import { Readable } from 'node:stream'
import { abortError, type ByteRange, type CallOptions, errorMessage, VarveError } from '@varve/core'
import { CatStream } from './cat-stream.ts'
import { feed } from './feed.ts'
import { parseObject, type Redact } from './json-output.ts'
import { parseLine, parseStat, type RemoteFile, readLines } from './lsjson.ts'
import { rcloneError, saysMissing, saysNoCommand, saysPartial } from './rclone-error.ts'
import { assertHelperOptions, type RcloneHelperOptions } from './rclone-options.ts'
import type { RcloneExit, RcloneProcess } from './rclone-process.ts'
import { RcloneRunner } from './rclone-runner.ts'
import { parseFeatures, type RemoteFeatures } from './remote-features.ts'
import { parseUploads, type UnfinishedUpload } from './unfinished-uploads.ts'

/** The slowest copy within a server that is waited for, in bytes a second: some servers move by copying. */
const SLOWEST_COPY = 8 * 1024 * 1024
/** How often a folder is made that cannot be. */
const MKDIR_ATTEMPTS = 3
/** Less than any age, whatever the server's clock says. */
const ANY_AGE = '-8760h'

/** Options of {@link RcloneHelper.rcat}. */
export interface RcatOptions extends CallOptions {
  /** The size in bytes, where it is known. */
  size?: number
  /** Called when rclone has taken a chunk. */
  onTaken?: (chunk: Uint8Array) => void
}

/** Options of {@link RcloneHelper.cat}. */
export interface CatOptions extends CallOptions {
  /**
   * Whether the range ends where the file does, so that nothing may come after it: a file that has become longer is not
   * taken for what it was. Default: false.
   */
  toEnd?: boolean
}

/** Options of {@link RcloneHelper.list}. */
export interface ListOptions extends CallOptions {
  /** Called when the folder is not there. */
  onMissing?: () => void
}

/** Options of {@link RcloneHelper.moveTo}. */
export interface MoveOptions extends CallOptions {
  /** Called before what is at the other path is removed, where rclone cannot move over it. */
  onRemoving?: (former: RemoteFile) => void
}

/**
 * rclone, for one remote: manages how the remote is known to rclone and runs its commands. Data goes by pipes, never
 * over a local disk, and secrets by the environment, never by the command line.
 *
 * Paths are those of rclone: relative to the remote's root unless they begin with `/`. Nothing is checked of
 * them; {@link RcloneDriver} keeps to its prefix.
 */
export class RcloneHelper {
  readonly #remoteName: string
  readonly #rclone: RcloneRunner
  #features: RemoteFeatures | undefined

  /** @throws INVALID_CONFIG, which names the option */
  constructor(options: RcloneHelperOptions) {
    assertHelperOptions(options)
    this.#remoteName = options.remoteName
    this.#rclone = new RcloneRunner(options)
  }

  /** A path as rclone wants it: `remote:path`. */
  target(path: string): string {
    return `${this.#remoteName}:${path}`
  }

  /**
   * Looks whether rclone is there and new enough, and returns its version.
   *
   * @throws COMMAND_MISSING; INVALID_CONFIG with both versions
   */
  version(options: CallOptions = {}): Promise<string> {
    return this.#rclone.version(options)
  }

  /**
   * Refuses an rclone that is too old, as {@link version} does; starts one only where this process has not found the
   * program to be new enough before. One of 1.57 or 1.58 would take every command, and upload without comparing
   * checksums.
   *
   * @throws COMMAND_MISSING; INVALID_CONFIG with both versions
   */
  mustBeNewEnough(options: CallOptions = {}): Promise<void> {
    return this.#rclone.mustBeNewEnough(options)
  }

  /** What the remote can do; asked for once. */
  async features(options: CallOptions = {}): Promise<RemoteFeatures> {
    const target = this.target('')
    // what was found is kept, not the call: who gives that up gives up no other
    this.#features ??= parseFeatures(
      await this.#rclone.must(['backend', 'features', target], target, options),
      this.#rclone.redact,
    )
    return this.#features
  }

  /**
   * Uploads what a source gives to a path. Resolves when rclone has ended well and the source has ended without another
   * byte; when the source or `onTaken` fails, or the signal fires, rclone is killed, and has ended before this rejects.
   * What is left at the path then is for the caller to remove.
   *
   * @param open opens the source, which must end with an error when the signal that it is given fires
   * @throws UPLOAD_FAILED, TIMEOUT, ABORTED, and what the storage failed with; what the source or `onTaken` throws is thrown as
   *   it is
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
    const process = await this.#rclone.start(['rcat', ...known, '--timeout', '0', target], options, true)
    process.stdout.resume()
    let failure: { error: unknown } | undefined
    const fail = (error: unknown) => {
      failure = { error }
      const message = `The upload failed here: ${errorMessage(error)}`
      process.stop(new VarveError('ABORTED', message, { cause: error }))
    }
    const taken = (chunk: Uint8Array) => {
      try {
        onTaken?.(chunk)
      } catch (error) {
        if (!process.failed.aborted) fail(error)
      }
    }
    try {
      // also given up when rclone has ended and only the source has not
      await feed(process, open(signal ? AbortSignal.any([process.failed, signal]) : process.failed), taken)
    } catch (error) {
      if (!process.failed.aborted) fail(error)
    }
    const exit = await process.exited
    if (failure) throw failure.error
    if (process.stopped) throw process.stopped
    if (signal?.aborted) throw abortError(signal)
    if (exit.exitCode !== 0)
      throw await this.#rclone.explain(exit, { target, code: 'UPLOAD_FAILED' }, options)
  }

  /** The bytes of a file from `start` to before `end`, all of which must be there. The stream fails otherwise. */
  async cat(path: string, range: ByteRange, options: CatOptions = {}): Promise<Readable> {
    const { start, end } = range
    const { toEnd = false } = options
    if (start === end) return Readable.from([])
    const part = ['--offset', String(start), ...(toEnd ? [] : ['--count', String(end - start)])]
    const target = this.target(path)
    const process = await this.#rclone.start(['cat', ...part, '--timeout', '0', target], options, false)
    return new CatStream(process, {
      target,
      length: end - start,
      signal: options.signal,
      toError: exit => rcloneError(exit, { target }),
    })
  }

  /** The file at a path; undefined where there is none, or a folder. */
  async stat(path: string, options: CallOptions = {}): Promise<RemoteFile | undefined> {
    const target = this.target(path)
    const args = ['lsjson', '--stat', '--files-only', '--no-mimetype', '--use-server-modtime', target]
    const { exit, stdout } = await this.#rclone.run(args, options)
    if (saysMissing(exit)) return undefined
    if (exit.exitCode !== 0) throw await this.#rclone.explain(exit, { target }, options)
    return parseStat(stdout, this.#rclone.redact)
  }

  /**
   * All files in a folder and below it, as rclone finds them. A folder that is not there has none; where the path is a
   * file, that file is given by its last name, as if it were in a folder.
   */
  async *list(path: string, options: ListOptions = {}): AsyncGenerator<RemoteFile> {
    const target = this.target(path)
    const args = ['lsjson', '-R', '--files-only', '--no-mimetype', '--use-server-modtime', target]
    const process = await this.#rclone.start(args, options, false)
    let found = false
    try {
      for await (const line of linesOf(process, this.#rclone.redact)) {
        process.watch.progress()
        const file = parseLine(line, this.#rclone.redact)
        if (!file) continue
        found = true
        const held = process.watch.hold() // while who reads the listing does something else
        try {
          yield file
        } finally {
          held[Symbol.dispose]()
        }
        if (options.signal?.aborted) throw abortError(options.signal)
      }
    } finally {
      // it has printed all, or is not listened to any more
      if (!process.stdout.readableEnded) process.stop(new VarveError('ABORTED', 'The listing was left.'))
      await process.exited
    }
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    if (saysMissing(exit)) {
      // it says so of any folder in it as well
      if (found || saysPartial(exit)) throw partial(exit, target)
      options.onMissing?.()
    } else if (exit.exitCode !== 0) throw await this.#rclone.explain(exit, { target }, options)
  }

  /**
   * Whether a folder is there. In a bucket any is; it is the bucket that has to be there.
   *
   * @throws what the remote failed with, where it does not answer or refuses
   */
  async hasFolder(path: string, options: CallOptions = {}): Promise<boolean> {
    const target = this.target(path)
    const process = await this.#rclone.start(['lsf', '--max-depth', '1', target], options, false)
    for await (const _ of linesOf(process, this.#rclone.redact)) {
      process.stop(new VarveError('ABORTED', 'The first name is enough.'))
      await process.exited
      return true
    }
    const exit = await process.exited
    if (process.stopped) throw process.stopped
    if (saysMissing(exit)) return false
    if (exit.exitCode !== 0) throw await this.#rclone.explain(exit, { target }, options)
    return true
  }

  /** Makes a folder and those above it. One that is there already is no error. */
  async makeFolder(path: string, options: CallOptions = {}): Promise<void> {
    const target = this.target(path)
    for (let attempt = 1; ; attempt++) {
      const { exit } = await this.#rclone.run(['mkdir', target], options)
      if (exit.exitCode === 0) return
      // over SFTP, as elsewhere, it fails where somebody else makes one of them at the same moment
      if (attempt < MKDIR_ATTEMPTS && !rcloneError(exit, { target }).retryable) continue
      throw await this.#rclone.explain(exit, { target }, options)
    }
  }

  /**
   * Moves a file to another path, and over what is there.
   *
   * @param size the file's, in bytes: a server that moves by copying gets time for it
   */
  async moveTo(from: string, to: string, size: number, options: MoveOptions = {}): Promise<void> {
    const { onRemoving, ...call } = options
    const { signal: _, ...unstoppable } = call
    const idleMs = this.#rclone.timeoutMs + (size / SLOWEST_COPY) * 1000
    const { duplicateNames } = await this.features(call)
    const target = this.target(to)
    const move = async (how: string, call: CallOptions) => {
      const args = ['moveto', how, this.target(from), target]
      const { exit } = await this.#rclone.run(args, { ...call, idleMs })
      return exit.exitCode === 0 ? undefined : this.#rclone.explain(exit, { target }, options)
    }
    // Else rclone removes what is there before it moves, and takes two files of one size and time for the same.
    const refusal = duplicateNames ? undefined : await move('--no-check-dest', call)
    if (refusal?.retryable) throw refusal
    if (!refusal && !duplicateNames) return
    const former = await this.stat(to, call)
    if (former) onRemoving?.(former)
    // Some servers rename over nothing, nor does rclone's sftp (1.60) anywhere. Then rclone removes what is there and
    // renames, which is not to be given up in between.
    const failure = await move('--ignore-times', former ? unstoppable : call)
    if (failure) throw failure
  }

  /** Removes a file, and looks whether it is gone. False where there was none, or a folder. */
  async deleteFile(path: string, options: CallOptions = {}): Promise<boolean> {
    const target = this.target(path)
    const { exit } = await this.#rclone.run(['deletefile', target], options)
    const missing = saysMissing(exit)
    if (missing) return false
    if (exit.exitCode !== 0) throw await this.#rclone.explain(exit, { target }, options)
    // where an FTP server refuses to delete it, rclone ends well all the same
    if (await this.stat(path, options)) {
      throw new VarveError(
        'STORAGE_ACCESS_DENIED',
        `rclone deletefile: failed for ${target}: it is still there. Check the remote's credentials, and that they may delete there.`,
        { context: { command: 'rclone', args: exit.args, exitCode: exit.exitCode, stderr: exit.stderr } },
      )
    }
    return true
  }

  /** Uploads in parts below a folder that have not come to an end; none where the remote knows no such. */
  async unfinishedUploads(path: string, options: CallOptions = {}): Promise<UnfinishedUpload[]> {
    const { keepsParts } = await this.features(options)
    if (!keepsParts) return []
    const target = this.target(path)
    const { exit, stdout } = await this.#rclone.run(['backend', 'list-multipart-uploads', target], options)
    if (saysNoCommand(exit)) return []
    if (exit.exitCode !== 0) throw await this.#rclone.explain(exit, { target }, options)
    return parseUploads(stdout, path, this.#rclone.redact)
  }

  /** Removes what there is of uploads in parts to a path that have not come to an end, however young they are. */
  async removeParts(path: string, options: CallOptions = {}): Promise<void> {
    const { keepsParts } = await this.features(options)
    if (!keepsParts) return
    const target = this.target(path)
    const { exit } = await this.#rclone.run(
      ['backend', 'cleanup', '-o', `max-age=${ANY_AGE}`, target],
      options,
    )
    if (exit.exitCode !== 0 && !saysNoCommand(exit)) {
      throw await this.#rclone.explain(exit, { target }, options)
    }
  }

  /** Bytes that can still be written, where the remote tells. */
  async freeBytes(path: string, options: CallOptions = {}): Promise<number | undefined> {
    const { tellsSpace } = await this.features(options)
    if (!tellsSpace) return undefined
    const { exit, stdout } = await this.#rclone.run(['about', '--json', this.target(path)], options)
    if (exit.exitCode !== 0) return undefined // the backend can, but this server does not: it is told as unknown
    const { free } = parseObject(stdout, 'about', this.#rclone.redact)
    return typeof free === 'number' ? free : undefined
  }
}

/** The error of a listing that lacks something. */
function partial(exit: RcloneExit, target: string): VarveError {
  const { code, message, context } = rcloneError(exit, { target })
  const why =
    'Only a part of it was listed: a folder in it went away meanwhile, or the remote failed. List it again.'
  return new VarveError(code, `${message} ${why}`, { context, retryable: true })
}

/** The lines that an rclone prints, as they come. @throws why it was stopped, if it was */
async function* linesOf(process: RcloneProcess, redact: Redact): AsyncGenerator<string> {
  try {
    yield* readLines(process.stdout, redact)
  } catch (error) {
    throw process.stopped ?? error // its output was destroyed
  }
}
