import { type ChildProcess, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { chmod, chown, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { type AddressInfo, connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import { pollUntil } from './lab-poll.ts'

/** The one user of the lab's sshd, who is in no other process's /etc/passwd. */
const USER = { name: 'varve', id: 64_999 }
const PASSWORD = 'lab-password-3f9c27'
const PASSWORD_HASH =
  '$6$varvelab$IvoxqTxj1dTTZpfov0vc3RXZ/nU/Lc09NlgSf6aB8E422zJ3KS0Vy.Zv1ENdYSvJdFdEMUHCDD1ruFaQMWH6m/'

/**
 * The first process of the namespaces that sshd and its sessions live in, where the lab's user is in the password
 * file; the machine's own files stay as they are. It lives as long as its standard input is open, and when it
 * goes, however that comes about, the kernel kills the rest.
 */
const SUPERVISOR = `
mount --bind "$1/passwd" /etc/passwd &&
mount --bind "$1/shadow" /etc/shadow &&
mount -t tmpfs tmpfs /run && mkdir /run/sshd || exit
/usr/sbin/sshd -D -e -f "$1/sshd_config" < /dev/null &
cat > /dev/null
`

/** Options of {@link startSshd}. */
export interface SshdOptions {
  /** Requests of the SFTP protocol that this server does not know, such as `posix-rename` or `fsync`. Default: none. */
  denied?: readonly string[]
  /** More lines for its sshd_config. They win over the lab's own. */
  config?: readonly string[]
}

/** An OpenSSH server on 127.0.0.1, with a user of its own. Disposing of it ends it and removes its files. */
export class SshdLab implements AsyncDisposable {
  /** Where it listens, on 127.0.0.1. */
  readonly port: number
  /** Who can log in. */
  readonly username: string = USER.name
  /** That user's password. */
  readonly password: string = PASSWORD
  /** The folder in which a login begins; the user owns it. */
  readonly home: string
  /** The file of a private key that can log in, without a passphrase. */
  readonly keyFile: string
  readonly #folder: string
  readonly #log: string[] = []
  #child: ChildProcess | undefined

  /** @internal */
  constructor(folder: string, port: number) {
    this.#folder = folder
    this.port = port
    this.home = join(folder, 'home')
    this.keyFile = join(folder, 'client_key')
  }

  /** The user's id on the machine: who owns what the server writes. */
  get userId(): number {
    return USER.id
  }

  /** What the server has logged since it was first started. */
  get log(): string {
    return this.#log.join('')
  }

  /** The public host key, as it stands in a known_hosts file after the host's name. */
  async hostKey(): Promise<string> {
    const [type = '', key = ''] = (await readFile(join(this.#folder, 'host_key.pub'), 'utf8')).split(' ')
    return `${type} ${key}`
  }

  /** The fingerprint of the host key, such as `SHA256:…`. */
  async fingerprint(): Promise<string> {
    const [, key = ''] = (await this.hostKey()).split(' ')
    const digest = createHash('sha256').update(Buffer.from(key, 'base64')).digest('base64')
    return `SHA256:${digest.replace(/=+$/, '')}`
  }

  /** Ends the server and all its sessions at once, as a power cut does. */
  async kill(): Promise<void> {
    const child = this.#child
    this.#child = undefined
    if (child === undefined) return
    // the sessions hold the log's pipe as well: it closes when the last of them is gone
    const gone = once(child, 'close', { signal: AbortSignal.timeout(30_000) })
    child.kill('SIGKILL')
    await gone
  }

  /** Starts the server after {@link SshdLab.kill}, on the same port. */
  async start(): Promise<void> {
    const namespaces = ['--mount', '--pid', '--fork', '--kill-child']
    const child = spawn('unshare', [...namespaces, 'sh', '-c', SUPERVISOR, 'sh', this.#folder], {
      stdio: ['pipe', 'ignore', 'pipe'],
      detached: true, // Ctrl-C in a terminal is for the test, which then stops the lab
    })
    child.on('error', error => this.#log.push(`${error.message}\n`))
    child.stdin?.on('error', () => undefined) // the supervisor has ended by itself
    child.stderr?.setEncoding('utf8').on('data', text => this.#log.push(text))
    this.#child = child
    try {
      await this.#answer(child)
    } catch (error) {
      await this.kill()
      throw error
    }
  }

  /** {@link SshdLab.kill}, then {@link SshdLab.start}. */
  async restart(): Promise<void> {
    await this.kill()
    await this.start()
  }

  /** Gives the server another host key, as a new installation has; it is started anew. */
  async replaceHostKey(type: 'ed25519' | 'ecdsa' | 'rsa' = 'ed25519'): Promise<void> {
    await this.kill()
    const file = join(this.#folder, 'host_key')
    await rm(file)
    await makeKey(file, type)
    await this.start()
  }

  /** Makes a folder that the user owns, for mounts and for several storages beside each other. */
  async makeFolder(path: string): Promise<void> {
    await mkdir(path, { recursive: true })
    await chown(path, USER.id, USER.id)
  }

  /** Stops the server and removes its folder. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill()
    await rm(this.#folder, { recursive: true, force: true })
  }

  async #answer(child: ChildProcess): Promise<void> {
    await pollUntil(
      async () => {
        if (child.exitCode !== null || child.pid === undefined || this.#failed()) {
          throw new Error(`sshd did not start. ${this.log.slice(-2000)}`)
        }
        return (await greets(this.port)) ? true : undefined
      },
      30_000,
      () => `sshd does not answer after 30 s. ${this.log.slice(-2000)}`,
    )
  }

  #failed(): boolean {
    return /fatal: |no hostkeys available|terminating/.test(this.#log.at(-1) ?? '')
  }
}

/**
 * Starts an sshd with a host key of its own, whose user can log in with a password and with a key, and can use SFTP
 * only. Needs root and the Debian package openssh-server.
 */
export async function startSshd({ denied = [], config = [] }: SshdOptions = {}): Promise<SshdLab> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-sshd-'))
  const lab = new SshdLab(folder, await freePort())
  try {
    await chmod(folder, 0o711)
    await lab.makeFolder(lab.home)
    await makeKey(join(folder, 'host_key'), 'ed25519')
    await makeKey(lab.keyFile, 'ed25519')
    const { name, id } = USER
    const passwd = await readFile('/etc/passwd', 'utf8')
    await writeFile(join(folder, 'passwd'), `${passwd}${name}:x:${id}:${id}::${lab.home}:/bin/sh\n`)
    await writeFile(join(folder, 'shadow'), `${name}:${PASSWORD_HASH}:19000:0:99999:7:::\n`, { mode: 0o600 })
    const requests = denied.length === 0 ? '' : ` -P ${denied.join(',')}`
    const lines = [
      ...config, // of two lines for one thing sshd takes the first
      `Port ${lab.port}`,
      'ListenAddress 127.0.0.1',
      `HostKey ${folder}/host_key`,
      `AuthorizedKeysFile ${folder}/client_key.pub`,
      'PidFile none',
      'UsePAM no',
      'StrictModes no',
      'UseDNS no',
      'MaxStartups 100',
      'LogLevel VERBOSE',
      'Subsystem sftp internal-sftp',
      `ForceCommand internal-sftp${requests}`,
    ]
    await writeFile(join(folder, 'sshd_config'), `${lines.join('\n')}\n`)
    await lab.start()
    return lab
  } catch (error) {
    await lab[Symbol.asyncDispose]()
    throw error
  }
}

async function makeKey(file: string, type: string): Promise<void> {
  await execa('ssh-keygen', ['-q', '-t', type, '-N', '', '-C', 'varve-lab', '-f', file], { timeout: 30_000 })
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

/** Whether an SSH server says who it is. */
async function greets(port: number): Promise<boolean> {
  const socket = connect({ host: '127.0.0.1', port, timeout: 2000 })
  try {
    const [first] = await once(socket, 'data', { signal: AbortSignal.timeout(2000) })
    return String(first).startsWith('SSH-2.0-')
  } catch {
    return false // refused, or silent: not yet
  } finally {
    socket.destroy()
  }
}
