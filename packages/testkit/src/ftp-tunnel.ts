import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import type { VsftpdLab } from './lab-vsftpd.ts'
import { NetworkProxy } from './network-proxy.ts'

let tunnels = 1

/**
 * An address of its own for an FTP server, all connections to which, control and data, go through one network proxy:
 * it listens on the server's ports, and tells the other end of the proxy in two bytes which port was meant.
 */
export interface FtpTunnel extends AsyncDisposable {
  /** The address, which has the server's port. */
  readonly host: string
  /** What all connections go through. */
  readonly proxy: NetworkProxy
}

/** Opens a tunnel to the lab's server. Disposing of it closes the tunnel. */
export async function openFtpTunnel(lab: VsftpdLab): Promise<FtpTunnel> {
  tunnels = (tunnels % 250) + 1
  const host = `127.0.0.${tunnels}`
  const far = await listen(0, '127.0.0.1', client => {
    client.once('readable', () => {
      const port: Buffer | null = client.read(2)
      if (port === null) client.destroy()
      else relay(client, connectTo(port.readUInt16BE()))
    })
  })
  const proxy = await NetworkProxy.start({ port: (far.address() as AddressInfo).port })
  const near = await Promise.all(
    [lab.port, ...lab.dataPorts].map(port =>
      listen(port, host, client => {
        const inner = connectTo(proxy.port)
        const header = Buffer.alloc(2)
        header.writeUInt16BE(port)
        inner.write(header)
        relay(client, inner)
      }),
    ),
  )
  return {
    host,
    proxy,
    async [Symbol.asyncDispose]() {
      for (const server of [...near, far]) server.close()
      await proxy[Symbol.asyncDispose]()
    },
  }
}

async function listen(port: number, host: string, take: (client: Socket) => void): Promise<Server> {
  const server = createServer({ allowHalfOpen: true, noDelay: true }, client => {
    client.on('error', () => undefined) // what follows is its 'close'
    take(client)
  }).listen(port, host)
  await once(server, 'listening')
  return server
}

function connectTo(port: number): Socket {
  const socket = connect({ port, host: '127.0.0.1', allowHalfOpen: true, noDelay: true })
  return socket.on('error', () => undefined)
}

/** Passes everything on, also ends and resets. */
function relay(one: Socket, other: Socket): void {
  for (const [from, to] of [
    [one, other],
    [other, one],
  ] as const) {
    from.pipe(to)
    from.once('close', hadError => {
      if (hadError || !from.readableEnded) to.resetAndDestroy()
    })
  }
}
