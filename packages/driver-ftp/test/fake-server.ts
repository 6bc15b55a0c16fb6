import { once } from 'node:events'
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import { onTestFinished } from 'vitest'

/** What a {@link FakeServer} does in place of a command: a reply, or nothing for the usual. */
export type Twist = (argument: string, session: Session) => string | undefined

/** One control connection. */
export interface Session {
  readonly control: Socket
  /** Where the next transfer begins. */
  offset: number
}

interface Entry {
  readonly name: string
  readonly file: Buffer | undefined
}

/** An FTP server with all in memory, for what a real one cannot be made to do. */
export class FakeServer {
  readonly files = new Map<string, Buffer>()
  readonly folders = new Set<string>(['/'])
  /** Every line that came. */
  readonly commands: string[] = []
  /** By command: what it does otherwise. */
  readonly twists: Record<string, Twist> = {}
  /** What `FEAT` names. */
  features: string[] = ['SIZE', 'MDTM', 'REST STREAM', 'UTF8']
  /** Whether a data connection is over before the server says that it is used; for data of no bytes. */
  dataFirst = false
  /** How many characters each listing lacks at its end. */
  listingLacks = 0
  readonly #server: Server = createServer(control => this.#serve(control))
  readonly #sockets = new Set<Socket>()

  /** A server and a driver of it, for the test that runs. */
  static async begin(
    options: Partial<FtpDriverOptions> = {},
  ): Promise<{ server: FakeServer; driver: FtpDriver }> {
    const server = new FakeServer()
    const listening = server.#server.listen(0, '127.0.0.1')
    await once(listening, 'listening')
    const { port } = listening.address() as AddressInfo
    const login = { host: '127.0.0.1', port, username: 'user', password: 'pa55word', tls: 'none' } as const
    const driver = new FtpDriver({ ...login, timeoutMs: 5000, ...options })
    onTestFinished(async () => {
      await driver[Symbol.asyncDispose]()
      listening.close()
      for (const socket of server.#sockets) socket.destroy()
    })
    return { server, driver }
  }

  /** How often a command came. */
  count(verb: string): number {
    return this.commands.filter(line => line.split(' ')[0] === verb).length
  }

  #serve(control: Socket): void {
    this.#keep(control)
    const session: Session = { control, offset: 0 }
    let cwd = '/'
    let from = ''
    let data: Promise<Socket> | undefined
    const reply = (text: string) => control.writable && control.write(`${text}\r\n`)
    const at = (path: string) => (path.startsWith('/') ? path : `${cwd === '/' ? '' : cwd}/${path}`)
    const passive = async (text: (port: number) => string) => {
      const server = createServer()
      server.listen(0, '127.0.0.1')
      await once(server, 'listening')
      data = once(server, 'connection').then(([socket]) => {
        server.close()
        return this.#keep(socket)
      })
      reply(text((server.address() as AddressInfo).port))
    }
    const send = async (bytes: Buffer, said = '226 Done.') => {
      if (!this.dataFirst) reply('150 Here it comes.')
      const socket = await data
      socket?.end(bytes)
      if (this.dataFirst) {
        if (socket) await once(socket, 'close')
        reply('150 It came.')
      }
      reply(said)
    }
    const list = (line: (entry: Entry) => string) => {
      const said = this.twists['end of LIST']?.(cwd, session)
      const lines = said ? '' : this.#entries(cwd).map(line).join('')
      return send(Buffer.from(lines.slice(0, lines.length - this.listingLacks)), said)
    }
    const commands: Record<string, (argument: string) => unknown> = {
      FEAT: () => reply(`211-Features:\r\n${this.features.map(name => ` ${name}\r\n`).join('')}211 End`),
      PWD: () => reply(`257 "${cwd}"`),
      NOOP: () => reply('200 OK'),
      TYPE: () => reply('200 OK'),
      OPTS: () => reply('200 OK'),
      USER: () => reply('331 Password?'),
      PASS: () => reply('230 In.'),
      EPSV: () => passive(port => `229 Extended Passive Mode (|||${port}|)`),
      PASV: () => passive(port => `227 Passive Mode (10,99,99,99,${port >> 8},${port & 255}).`),
      CWD: path => {
        if (!this.folders.has(at(path))) return reply('550 No such folder.')
        cwd = at(path)
        return reply('250 OK')
      },
      MKD: path => {
        if (this.folders.has(at(path))) return reply('550 Exists.')
        this.folders.add(at(path))
        return reply('257 Made.')
      },
      RMD: path => {
        const inside = [...this.files.keys(), ...this.folders].some(name => name.startsWith(`${at(path)}/`))
        return reply(!inside && this.folders.delete(at(path)) ? '250 OK' : '550 No.')
      },
      DELE: path => reply(this.files.delete(at(path)) ? '250 OK' : '550 No.'),
      SIZE: path => {
        const file = this.files.get(at(path))
        return reply(file ? `213 ${file.length}` : '550 No.')
      },
      MDTM: path => reply(this.files.has(at(path)) ? '213 20240229123456' : '550 No.'),
      REST: offset => {
        session.offset = Number(offset)
        return reply('350 OK')
      },
      RNFR: path => {
        from = at(path)
        return reply(this.files.has(from) ? '350 OK' : '550 No.')
      },
      RNTO: path => {
        this.files.set(at(path), this.files.get(from) ?? Buffer.alloc(0))
        this.files.delete(from)
        return reply('250 OK')
      },
      STOR: async path => {
        const { offset } = session
        session.offset = 0
        this.files.set(at(path), (this.files.get(at(path)) ?? Buffer.alloc(0)).subarray(0, offset))
        reply('150 OK')
        const socket = await data
        if (!socket) return
        let position = offset // its own, whatever others do to the file meanwhile
        for await (const chunk of socket) {
          this.twists['chunk of STOR']?.(at(path), session)
          const file = this.files.get(at(path)) ?? Buffer.alloc(0)
          const before = [file.subarray(0, position), Buffer.alloc(Math.max(0, position - file.length))]
          position += chunk.length
          this.files.set(at(path), Buffer.concat([...before, chunk, file.subarray(position)]))
        }
        const said = this.twists['end of STOR']?.(at(path), session)
        reply(said ?? '226 Done.')
      },
      RETR: path => {
        const { offset } = session
        session.offset = 0
        const file = this.files.get(at(path))
        return file ? send(file.subarray(offset)) : reply('550 No.')
      },
      LIST: () => list(this.#longLine),
      MLSD: () => list(this.#factLine),
      QUIT: () => control.end(),
    }
    let rest = ''
    control.setEncoding('utf8').on('data', text => {
      const lines = `${rest}${text}`.split('\r\n')
      rest = lines.pop() ?? ''
      for (const line of lines) {
        this.commands.push(line)
        const [verb = ''] = line.split(' ', 1)
        const argument = line.slice(verb.length + 1)
        const said = this.twists[verb]?.(argument, session)
        if (said !== undefined) reply(said)
        else if (commands[verb]) commands[verb](argument)
        else reply('500 Unknown.')
      }
    })
    reply('220 Hello.')
  }

  #keep(socket: Socket): Socket {
    this.#sockets.add(socket)
    socket.on('error', () => undefined)
    return socket.once('close', () => this.#sockets.delete(socket))
  }

  #entries(folder: string): Entry[] {
    const base = folder === '/' ? '/' : `${folder}/`
    return [...this.folders, ...this.files.keys()]
      .filter(path => path !== '/' && path.startsWith(base) && !path.slice(base.length).includes('/'))
      .map(path => ({ name: path.slice(base.length), file: this.files.get(path) }))
  }

  #longLine = ({ name, file }: Entry): string =>
    `${file ? '-rw-r--r--' : 'drwxr-xr-x'}   1 some one  ${file?.length ?? 4096} Feb 29  2024 ${name}\r\n`

  #factLine = ({ name, file }: Entry): string =>
    `type=${file ? 'file' : 'dir'};size=${file?.length ?? 0};modify=20240229123456; ${name}\r\n`
}
