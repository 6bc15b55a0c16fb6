import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { execa } from 'execa'
import { type CephLab, startCeph } from './lab-ceph.ts'
import { freePorts, LabDaemon } from './lab-daemon.ts'

const START_TIMEOUT_MS = 60_000

/** A user of the lab's S3 server. */
export interface S3User {
  /** The name that `radosgw-admin` knows it by. */
  readonly uid: string
  /** The id of its key. */
  readonly accessKey: string
  /** The secret of its key. */
  readonly secretKey: string
}

/**
 * Ceph's S3 gateway (`radosgw`) on the loopback address: http on one port, https with a certificate of its own
 * authority on another. Disposing of it ends it, and the cluster too where it was started for it.
 */
export class RadosgwLab implements AsyncDisposable {
  /** Where http is listened for, on 127.0.0.1. */
  readonly port: number
  /** Where https is listened for, on 127.0.0.1. */
  readonly tlsPort: number
  /** Such as `http://127.0.0.1:7480`. */
  readonly endpoint: string
  /** The path of the certificate that https is to be trusted by, in PEM. */
  readonly caFile: string
  readonly #ceph: CephLab
  readonly #ownsCeph: boolean
  #daemon: LabDaemon | undefined

  /** @internal */
  constructor(ceph: CephLab, ownsCeph: boolean, [port, tlsPort]: [number, number]) {
    this.#ceph = ceph
    this.#ownsCeph = ownsCeph
    this.port = port
    this.tlsPort = tlsPort
    this.endpoint = `http://127.0.0.1:${port}`
    this.caFile = join(ceph.folder, 'radosgw.pem')
  }

  /** Makes a user with keys of its own, that may make buckets. */
  async createUser(uid: string): Promise<S3User> {
    const user = {
      uid,
      accessKey: `LAB${randomBytes(8).toString('hex').toUpperCase()}`,
      secretKey: randomBytes(20).toString('hex'),
    }
    const keys = ['--access-key', user.accessKey, '--secret-key', user.secretKey]
    await this.admin('user', 'create', '--uid', uid, '--display-name', uid, ...keys)
    return user
  }

  /** Runs `radosgw-admin` and gives its standard output. */
  async admin(...args: string[]): Promise<string> {
    return this.#ceph.run('radosgw-admin', ...args)
  }

  /** Kills the gateway, as a power cut does. */
  async kill(): Promise<void> {
    await this.#daemon?.kill()
  }

  /** Starts the gateway after {@link RadosgwLab.kill}, on the same ports. */
  async start(): Promise<void> {
    const { conf, folder } = this.#ceph
    const frontends = [
      `beast endpoint=127.0.0.1:${this.port} ssl_endpoint=127.0.0.1:${this.tlsPort}`,
      `ssl_certificate=${this.caFile} ssl_private_key=${this.caFile}`,
    ].join(' ')
    this.#daemon = new LabDaemon(
      'radosgw',
      ['-f', '--conf', conf, '-n', 'client.rgw', `--rgw_frontends=${frontends}`],
      join(folder, 'radosgw.out'),
    )
    await this.#daemon.ready(() => this.#answers(), START_TIMEOUT_MS)
  }

  /** {@link RadosgwLab.kill}, then {@link RadosgwLab.start}. */
  async restart(): Promise<void> {
    await this.kill()
    await this.start()
  }

  /** Ends the gateway, and the cluster too where it was started for it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill()
    if (this.#ownsCeph) await this.#ceph[Symbol.asyncDispose]()
  }

  /** @internal */
  async createCertificate(): Promise<void> {
    const names = 'subjectAltName=IP:127.0.0.1,DNS:localhost'
    const request = ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=lab']
    await execa('openssl', [
      ...request,
      '-addext',
      names,
      '-keyout',
      this.caFile,
      '-out',
      `${this.caFile}.crt`,
    ])
    await execa('sh', ['-c', 'cat "$1.crt" >> "$1"', 'sh', this.caFile])
  }

  async #answers(): Promise<boolean> {
    try {
      const answer = await fetch(this.endpoint, { signal: AbortSignal.timeout(5000) })
      await answer.arrayBuffer()
      return true
    } catch {
      return false // it does not listen yet
    }
  }
}

/**
 * Starts a {@link RadosgwLab} on a cluster, or on one of its own that ends with it. It needs root and the Debian
 * packages radosgw and openssl besides those of {@link startCeph}.
 */
export async function startRadosgw(ceph?: CephLab): Promise<RadosgwLab> {
  const cluster = ceph ?? (await startCeph())
  const [port = 0, tlsPort = 0] = await freePorts(2)
  const gateway = new RadosgwLab(cluster, ceph === undefined, [port, tlsPort])
  try {
    await gateway.createCertificate()
    await gateway.start()
  } catch (error) {
    await gateway[Symbol.asyncDispose]()
    throw error
  }
  return gateway
}
