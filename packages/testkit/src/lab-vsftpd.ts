import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, chown, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import { freePorts } from './lab-daemon.ts'
import { pollUntil } from './lab-poll.ts'

/** The one user of the lab's vsftpd, who is in no other process's /etc/passwd. */
const USER = { name: 'varve', id: 64_998 }
const PASSWORD = 'lab password 5d81c4'
/** vsftpd takes one of them at random for each transfer. */
const DATA_PORTS = 32

/**
 * The first process of the namespaces that vsftpd and its sessions live in, where the lab's user is in the password
 * file and PAM asks nothing else; the machine's own files stay as they are. It lives as long as its standard input is
 * open, and when it goes, however that comes about, the kernel kills the rest before it counts as gone.
 */
const SUPERVISOR = `
mount --bind "$1/passwd" /etc/passwd &&
mount --bind "$1/shadow" /etc/shadow &&
mount --bind "$1/pam" /etc/pam.d/vsftpd || exit
vsftpd "$1/vsftpd.conf" < /dev/null &
cat > /dev/null
`

/** Options of {@link startVsftpd}. */
export interface VsftpdOptions {
  /** Whether it offers `AUTH TLS` and insists on it (`explicit`), speaks TLS at once (`implicit`), or neither. Default: `none`. */
  tls?: 'none' | 'explicit' | 'implicit'
  /** More lines for its vsftpd.conf. They win over the lab's own. */
  config?: readonly string[]
}

/** A vsftpd on 127.0.0.1, with a user of its own. Disposing of it ends it and removes its files. */
export class VsftpdLab implements AsyncDisposable {
  /** Where its control connection listens, on 127.0.0.1. */
  readonly port: number
  /** Where its data connections listen, on 127.0.0.1; on 127.0.0.2 they were free at the start. */
  readonly dataPorts: readonly number[]
  /** Who can log in. */
  readonly username: string = USER.name
  /** That user's password. */
  readonly password: string = PASSWORD
  /** The folder that is `/` to the user, who owns it. */
  readonly home: string
  readonly #folder: string
  #output = ''
  #child: ChildProcess | undefined

  /** @internal */
  constructor(folder: string, port: number, dataPorts: readonly number[]) {
    this.#folder = folder
    this.port = port
    this.dataPorts = dataPorts
    this.home = join(folder, 'home')
  }

  /** Its certificate (PEM), for localhost, 127.0.0.1 and 127.0.0.2, signed by itself. */
  async certificate(): Promise<string> {
    return readFile(join(this.#folder, 'certificate.pem'), 'utf8')
  }

  /** Its log since it was first started, with all commands and replies. */
  async log(): Promise<string> {
    return readFile(join(this.#folder, 'vsftpd.log'), 'utf8').catch(() => '')
  }

  /** Ends the server and all its sessions at once, as a power cut does. */
  async kill(): Promise<void> {
    const child = this.#child
    this.#child = undefined
    if (child?.pid === undefined || child.exitCode !== null || child.signalCode !== null) return
    const gone = once(child, 'exit', { signal: AbortSignal.timeout(30_000) })
    child.stdin?.end()
    await gone
  }

  /** Starts the server after {@link VsftpdLab.kill}, on the same ports. */
  async start(): Promise<void> {
    const namespaces = ['--mount', '--pid', '--fork', '--kill-child']
    const child = spawn('unshare', [...namespaces, 'sh', '-c', SUPERVISOR, 'sh', this.#folder], {
      stdio: ['pipe', 'pipe', 'pipe'],
      detached: true, // Ctrl-C in a terminal is for the test, which then stops the lab
    })
    const take = (text: unknown) => {
      this.#output = `${this.#output}${text}`.slice(-2000)
    }
    child.on('error', error => take(error.message))
    child.stdin?.on('error', () => undefined) // the supervisor has ended by itself
    child.stdout?.on('data', take)
    child.stderr?.on('data', take)
    this.#child = child
    try {
      await this.#answer(child)
    } catch (error) {
      await this.kill()
      throw error
    }
  }

  /** {@link VsftpdLab.kill}, then {@link VsftpdLab.start}. */
  async restart(): Promise<void> {
    await this.kill()
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
        // it says what is wrong with its configuration on its standard output, and ends
        if (child.exitCode !== null || child.pid === undefined || /^\d00 OOPS/m.test(this.#output)) {
          throw new Error(`vsftpd did not start. ${this.#output}`)
        }
        return (await accepts(this.port)) || undefined
      },
      30_000,
      () => `vsftpd does not answer after 30 s. ${this.#output}`,
    )
  }
}

/** Starts a vsftpd. Needs root and the Debian packages vsftpd and openssl. */
export async function startVsftpd({ tls = 'none', config = [] }: VsftpdOptions = {}): Promise<VsftpdLab> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-vsftpd-'))
  const [port = 0] = await freePorts(1)
  const lab = new VsftpdLab(folder, port, await freePortRange(DATA_PORTS))
  try {
    await chmod(folder, 0o711)
    await mkdir(join(folder, 'empty'))
    await lab.makeFolder(lab.home)
    await makeUser(folder, lab.home)
    if (tls !== 'none') await makeCertificate(folder)
    const lines = [
      'listen=YES',
      'listen_address=127.0.0.1',
      `listen_port=${lab.port}`,
      `pasv_min_port=${lab.dataPorts[0]}`,
      `pasv_max_port=${lab.dataPorts.at(-1)}`,
      'background=NO',
      // no sandboxes of its own, which containers and new kernels do not always allow
      'seccomp_sandbox=NO',
      'isolate=NO',
      'isolate_network=NO',
      `secure_chroot_dir=${folder}/empty`,
      'pam_service_name=vsftpd',
      'anonymous_enable=NO',
      'local_enable=YES',
      'write_enable=YES',
      'chroot_local_user=YES',
      'allow_writeable_chroot=YES',
      `vsftpd_log_file=${folder}/vsftpd.log`,
      'xferlog_enable=YES',
      'log_ftp_protocol=YES',
      ...(tls === 'none' ? [] : tlsLines(folder)),
      ...(tls === 'implicit' ? ['implicit_ssl=YES'] : []),
      ...config, // of two lines for one thing vsftpd takes the last
    ]
    await writeFile(join(folder, 'vsftpd.conf'), `${lines.join('\n')}\n`)
    await lab.start()
    return lab
  } catch (error) {
    await lab[Symbol.asyncDispose]()
    throw error
  }
}

async function makeUser(folder: string, home: string): Promise<void> {
  const { name, id } = USER
  const passwd = await readFile('/etc/passwd', 'utf8')
  const { stdout: hash } = await execa('openssl', ['passwd', '-6', '-stdin'], {
    input: PASSWORD,
    timeout: 30_000,
  })
  await writeFile(join(folder, 'passwd'), `${passwd}${name}:x:${id}:${id}::${home}:/bin/sh\n`)
  await writeFile(join(folder, 'shadow'), `${name}:${hash}:19000:0:99999:7:::\n`, { mode: 0o600 })
  await writeFile(join(folder, 'pam'), 'auth required pam_unix.so nodelay\naccount required pam_unix.so\n')
}

async function makeCertificate(folder: string): Promise<void> {
  const names = 'subjectAltName=DNS:localhost,IP:127.0.0.1,IP:127.0.0.2'
  const files = ['-keyout', join(folder, 'key.pem'), '-out', join(folder, 'certificate.pem')]
  const key = ['-newkey', 'rsa:2048', '-nodes', '-days', '2']
  await execa('openssl', ['req', '-x509', ...key, '-subj', '/CN=localhost', '-addext', names, ...files], {
    timeout: 30_000,
  })
}

function tlsLines(folder: string): string[] {
  return [
    'ssl_enable=YES',
    `rsa_cert_file=${folder}/certificate.pem`,
    `rsa_private_key_file=${folder}/key.pem`,
    'ssl_ciphers=HIGH',
    'require_ssl_reuse=YES',
    'force_local_logins_ssl=YES',
    'force_local_data_ssl=YES',
  ]
}

/** Ports that follow each other, below those that the system gives to clients. */
async function freePortRange(count: number): Promise<number[]> {
  for (let attempt = 0; attempt < 100; attempt++) {
    const first = 20_000 + Math.floor(Math.random() * (12_000 - count))
    const ports = Array.from({ length: count }, (_, index) => first + index)
    const free = await Promise.all(
      ports.flatMap(port => [isFree(port, '127.0.0.1'), isFree(port, '127.0.0.2')]),
    )
    if (free.every(Boolean)) return ports
  }
  throw new Error(`There are no ${count} free ports in a row between 20000 and 32000.`)
}

async function isFree(port: number, host: string): Promise<boolean> {
  const server = createServer().listen(port, host)
  try {
    await once(server, 'listening')
    server.close()
    await once(server, 'close')
    return true
  } catch {
    return false // in use
  }
}

async function accepts(port: number): Promise<boolean> {
  const socket = connect({ host: '127.0.0.1', port, timeout: 2000 })
  try {
    await once(socket, 'connect', { signal: AbortSignal.timeout(2000) })
    return true
  } catch {
    return false // refused: not yet
  } finally {
    socket.destroy()
  }
}
