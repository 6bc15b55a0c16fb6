import type { Socket } from 'node:net'

/** The toy protocol in both directions: frames of a length and so many bytes; an empty one ends what came before. */
export function frame(bytes: Uint8Array | string): Buffer {
  const head = Buffer.alloc(4)
  head.writeUInt32BE(Buffer.byteLength(bytes))
  return Buffer.concat([head, Buffer.from(bytes as Uint8Array)])
}

/** A frame of JSON. */
export function message(value: unknown): Buffer {
  return frame(JSON.stringify(value))
}

/** The frames that come out of a socket. */
export async function* frames(socket: Socket): AsyncGenerator<Buffer, undefined> {
  let held: Buffer[] = []
  let heldBytes = 0
  let neededBytes = 4
  for await (const chunk of socket) {
    held.push(chunk)
    heldBytes += chunk.length
    while (heldBytes >= neededBytes) {
      let bytes = Buffer.concat(held)
      neededBytes = 4 + bytes.readUInt32BE()
      if (bytes.length >= neededBytes) {
        yield bytes.subarray(4, neededBytes)
        bytes = bytes.subarray(neededBytes)
        neededBytes = 4
      }
      held = [bytes]
      heldBytes = bytes.length
    }
  }
}
