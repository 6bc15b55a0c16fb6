import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'
import { SftpDriver, type SftpDriverOptions } from '@varve/driver-sftp'
import ssh2, { type Attributes, type Connection, type SFTPWrapper } from 'ssh2'
import { onTestFinished } from 'vitest'

const { OPEN_MODE, STATUS_CODE } = ssh2.utils.sftp
// The library writes a few of its keys of Ed25519 so that it cannot read them.
export const HOST_KEY: string = ssh2.utils.generateKeyPairSync('ecdsa', { bits: 256 }).private

/** What a {@link FakeServer} does in place of a request: a status, no answer at all, or nothing for the usual. */
export type Twist = (...paths: string[]) => Twisted | Promise<Twisted>
type Twisted = number | 'silence' | undefined

/** An SFTP server without any extension and with all in memory, for what a real one cannot be made to do. */
export class FakeServer {
  readonly files = new Map<string, Buffer>()
  readonly folders = new Set<string>(['/'])
  /** By request, such as `RENAME`: what it does otherwise. */
  readonly twists: Partial<Record<'RENAME' | 'REMOVE' | 'LSTAT' | 'WRITE' | 'FSETSTAT', Twist>> = {}
  /** How many names it tells at once of a folder, the first two of which are the folder's own and its parent's. */
  namesAtOnce = Number.POSITIVE_INFINITY
  /** Whether it ends every connection at once. */
  refuses = false
  /** How many connections there have been. */
  connections = 0
  /** Every request that changes a name, with its paths. */
  readonly changes: string[] = []
  /** How many bytes each write had, as they came. */
  readonly writes: number[] = []
  readonly #clients = new Set<Connection>()
  readonly #ssh = new ssh2.Server({ hostKeys: [HOST_KEY], ident: 'other' }, client => this.#serve(client))
  readonly #server = createServer({ noDelay: true }, socket => this.#ssh.injectSocket(socket))

  /** A server and a driver of it, for the test that runs. */
  static async begin(
    options: Partial<SftpDriverOptions> = {},
  ): Promise<{ server: FakeServer; driver: SftpDriver }> {
    const server = new FakeServer()
    const listening = server.#server.listen(0, '127.0.0.1')
    await once(listening, 'listening')
    const { port } = listening.address() as AddressInfo
    const login = { host: '127.0.0.1', port, username: 'user', password: 'pa55word' }
    const driver = new SftpDriver({ ...login, timeoutMs: 5000, ...options })
    onTestFinished(async () => {
      await driver[Symbol.asyncDispose]()
      server.cut()
      listening.close()
    })
    return { server, driver }
  }

  /** Breaks all connections. */
  cut(): void {
    for (const client of this.#clients) client.end()
  }

  /** Gives a file another name, as the usual answer to a RENAME does. */
  rename(from: string, to: string): number {
    const file = this.files.get(from)
    if (!file) return STATUS_CODE.NO_SUCH_FILE
    if (this.files.has(to) || this.folders.has(to)) return STATUS_CODE.FAILURE
    this.files.delete(from)
    this.files.set(to, file)
    return STATUS_CODE.OK
  }

  #serve(client: Connection): void {
    this.#clients.add(client)
    this.connections++
    if (this.refuses) client.end()
    client.on('close', () => this.#clients.delete(client))
    client.on('error', () => undefined) // a connection that was cut
    client.on('authentication', login => login.accept())
    client.on('session', accept => {
      accept().on('sftp', accept => this.#session(accept()))
    })
  }

  #session(sftp: SFTPWrapper): void {
    const handles: { path: string; read: number }[] = []
    const open = (path: string) => Buffer.of(handles.push({ path, read: 0 }) - 1)
    const at = (handle: Buffer) => handles[handle[0] ?? 0] ?? { path: '', read: 0 }
    const answer = (id: number, status: number) => sftp.status(id, status)
    const attributes = (path: string): Attributes | undefined => {
      const file = this.files.get(path)
      if (!file && !this.folders.has(path)) return undefined
      const mode = file ? 0o100600 : 0o40700
      return { mode, size: file?.length ?? 0, uid: 0, gid: 0, atime: 1e9, mtime: 1e9 }
    }
    const tell = (id: number, path: string) => {
      const found = attributes(path)
      if (found) sftp.attrs(id, found)
      else answer(id, STATUS_CODE.NO_SUCH_FILE)
    }
    /** Answers as a twist wants it, or else as `usual` does. */
    const twisted = async (
      name: keyof FakeServer['twists'],
      id: number,
      paths: string[],
      usual: () => number | undefined,
    ) => {
      if (name === 'RENAME' || name === 'REMOVE') this.changes.push(`${name} ${paths.join(' ')}`)
      const status = (await this.twists[name]?.(...paths)) ?? usual()
      if (typeof status === 'number') answer(id, status)
    }
    const put = (path: string, offset: number, data: Buffer) => {
      const former = this.files.get(path) ?? Buffer.alloc(0)
      const size = Math.max(former.length, offset + data.length)
      let { buffer } = former
      if (former.byteOffset > 0 || buffer.byteLength < size) {
        buffer = new ArrayBuffer(2 * size) // room to grow, so that not every write copies all
        former.copy(Buffer.from(buffer))
      }
      data.copy(Buffer.from(buffer), offset)
      this.files.set(path, Buffer.from(buffer, 0, size))
    }

    sftp.on('REALPATH', (id, path) => {
      const real = path === '.' ? '/' : path
      const found = attributes(real)
      if (found) sftp.name(id, [{ filename: real, longname: real, attrs: found }])
      else answer(id, STATUS_CODE.NO_SUCH_FILE)
    })
    sftp.on('STAT', tell)
    sftp.on('LSTAT', (id, path) =>
      twisted('LSTAT', id, [path], () => {
        tell(id, path)
        return undefined
      }),
    )
    sftp.on('FSTAT', (id, handle) => tell(id, at(handle).path))
    sftp.on('FSETSTAT', (id, handle, { size }) => {
      const { path } = at(handle)
      twisted('FSETSTAT', id, [path], () => {
        if (size !== undefined) {
          const file = Buffer.alloc(size)
          this.files.get(path)?.copy(file)
          this.files.set(path, file)
        }
        return STATUS_CODE.OK
      })
    })
    sftp.on('OPEN', (id, path, flags) => {
      if (!this.files.has(path) && flags & OPEN_MODE.CREAT) this.files.set(path, Buffer.alloc(0))
      if (this.files.has(path)) sftp.handle(id, open(path))
      else answer(id, this.folders.has(path) ? STATUS_CODE.FAILURE : STATUS_CODE.NO_SUCH_FILE)
    })
    sftp.on('CLOSE', id => answer(id, STATUS_CODE.OK))
    sftp.on('WRITE', (id, handle, offset, data) => {
      const { path } = at(handle)
      this.writes.push(data.length)
      twisted('WRITE', id, [path], () => {
        put(path, offset, data)
        return STATUS_CODE.OK
      })
    })
    sftp.on('READ', (id, handle, offset, length) => {
      const bytes = this.files.get(at(handle).path)?.subarray(offset, offset + length)
      if (bytes?.length) sftp.data(id, bytes)
      else answer(id, STATUS_CODE.EOF)
    })
    sftp.on('OPENDIR', (id, path) => {
      if (this.folders.has(path)) sftp.handle(id, open(path))
      else answer(id, STATUS_CODE.NO_SUCH_FILE)
    })
    sftp.on('READDIR', (id, handle) => {
      const folder = at(handle)
      const base = folder.path === '/' ? '/' : `${folder.path}/`
      const inside = [...this.files.keys(), ...this.folders].filter(
        path => path !== '/' && path.startsWith(base) && !path.slice(base.length).includes('/'),
      )
      const names = [`${base}.`, `${base}..`, ...inside].flatMap(path => {
        const attrs = attributes(path) ?? attributes('/')
        const filename = path.slice(base.length)
        return attrs ? [{ filename, longname: filename, attrs }] : []
      })
      const told = names.slice(folder.read, folder.read + this.namesAtOnce)
      if (told.length === 0) return answer(id, STATUS_CODE.EOF)
      folder.read += told.length
      sftp.name(id, told)
    })
    sftp.on('REMOVE', (id, path) =>
      twisted('REMOVE', id, [path], () =>
        this.files.delete(path) ? STATUS_CODE.OK : STATUS_CODE.NO_SUCH_FILE,
      ),
    )
    sftp.on('RENAME', (id, from, to) => twisted('RENAME', id, [from, to], () => this.rename(from, to)))
    sftp.on('MKDIR', (id, path) => {
      if (this.folders.has(path) || this.files.has(path)) return answer(id, STATUS_CODE.FAILURE)
      this.folders.add(path)
      answer(id, STATUS_CODE.OK)
    })
    sftp.on('RMDIR', (id, path) => {
      const inside = [...this.files.keys(), ...this.folders].some(name => name.startsWith(`${path}/`))
      answer(id, !inside && this.folders.delete(path) ? STATUS_CODE.OK : STATUS_CODE.FAILURE)
    })
  }
}
