import type { FileEntryWithStats, SFTPWrapper, Stats } from 'ssh2'
import type { SftpConnection } from './connection.ts'
import { close } from './remote-file.ts'
import { isStatus, STATUS } from './sftp-error.ts'

/** Folders whose beginnings are asked for at once, so that a distant server is not waited for once a folder. */
const FOLDERS_AHEAD = 16

/** A file that {@link walkFiles} found. */
export interface FoundFile {
  /** Its key. */
  readonly key: string
  readonly stats: Stats
}

/** Options of {@link walkFiles}. */
export interface WalkFilesOptions {
  /** The path of a folder of keys; '' is the storage's own. */
  pathOf: (folder: string) => string
  /** Whether to enter a folder. */
  enters: (folder: string) => boolean
  /** Whether to give a file. */
  takes: (key: string) => boolean
  signal?: AbortSignal | undefined
}

/**
 * The plain files in a folder and in those below it, as they are found: what comes and goes meanwhile may or may not be
 * among them. Symbolic links are neither given nor followed.
 */
export async function* walkFiles(
  connection: SftpConnection,
  folder: string,
  options: WalkFilesOptions,
): AsyncGenerator<FoundFile> {
  const { pathOf, enters, takes, signal } = options
  const waiting = [folder]
  const open: Folder[] = []
  try {
    for (;;) {
      while (open.length < FOLDERS_AHEAD) {
        const name = waiting.pop()
        if (name === undefined) break
        open.push(new Folder(connection, name, pathOf(name), signal))
      }
      const [current] = open
      if (current === undefined) return
      const entries = await current.page()
      if (entries.length === 0) {
        await current.close()
        open.shift()
      }
      for (const { filename, attrs } of entries) {
        if (filename === '.' || filename === '..') continue
        const key = current.name === '' ? filename : `${current.name}/${filename}`
        if (attrs.isDirectory() && enters(key)) waiting.push(key)
        else if (attrs.isFile() && takes(key)) yield { key, stats: attrs }
      }
    }
  } finally {
    for (const folder of open) folder.close().catch(() => undefined) // those of a walk that was broken off
  }
}

/** A folder that is being read: its first page is asked for at once, the others one after the other. */
class Folder {
  readonly name: string
  readonly #connection: SftpConnection
  readonly #signal: AbortSignal | undefined
  readonly #handle: Promise<Buffer | undefined>
  #next: Promise<FileEntryWithStats[]>

  constructor(connection: SftpConnection, name: string, path: string, signal: AbortSignal | undefined) {
    this.name = name
    this.#connection = connection
    this.#signal = signal
    this.#handle = this.#open(path)
    this.#next = this.#read()
    this.#next.catch(() => undefined) // seen by page(), if that is called at all
  }

  /** The next entries; none at the end. */
  async page(): Promise<FileEntryWithStats[]> {
    const entries = await this.#next
    if (entries.length > 0) {
      this.#next = this.#read()
      this.#next.catch(() => undefined) // the same
    }
    return entries
  }

  async close(): Promise<void> {
    await this.#next.catch(() => undefined) // no request may be under way
    const handle = await this.#handle.catch(() => undefined) // one that was not opened needs no end
    if (handle) await close(this.#connection, handle)
  }

  async #open(path: string): Promise<Buffer | undefined> {
    try {
      return await this.#connection.call<Buffer>((sftp, done) => sftp.opendir(path, done))
    } catch (error) {
      if (isStatus(error, STATUS.NO_SUCH_FILE)) return undefined
      throw error
    }
  }

  async #read(): Promise<FileEntryWithStats[]> {
    const handle = await this.#handle
    if (handle === undefined) return []
    try {
      return await this.#connection.call<FileEntryWithStats[]>((sftp, done) => readPage(sftp, handle, done), {
        signal: this.#signal,
      })
    } catch (error) {
      if (isStatus(error, STATUS.EOF)) return []
      throw error
    }
  }
}

type Done = (error: Error | undefined, entries: FileEntryWithStats[]) => void

/**
 * Reads the next page of a folder with all that is in it. The library would else leave `.` and `..` out, and a page of
 * nothing else look like the end.
 */
function readPage(sftp: SFTPWrapper, handle: Buffer, done: Done): void {
  // neither its documentation nor its types know of the options
  const { readdir } = sftp as unknown as {
    readdir: (this: SFTPWrapper, handle: Buffer, options: { full: true }, done: Done) => void
  }
  readdir.call(sftp, handle, { full: true }, done)
}
