import { describe, test } from 'vitest'
import { type Contract, expectStored, place } from './contract-target.ts'
import { cutBytes, cutCalls, cutDownloads, cutUploads, forEachAnswer } from './network-cuts.ts'
import { beginRemote, type Remote } from './remote-target.ts'

/** Connections that end in order, but too early: that is never the end of the data. */
export function describeEarlyEnds({ brief }: Contract, remote: Remote): void {
  describe('connections that end early', () => {
    const how = 'end'

    const bodies: [string, boolean][] = [['a body that opens once', false]]
    if (!brief) bodies.push(['a re-openable body', true]) // which is sent again, as where a connection is cut
    test.each(bodies)('%s is stored whole, or fails and leaves nothing', async (_, replayable) => {
      const toServer = { even: 4, beforeEnd: [64, 1] }
      const toClient = { even: 2, beforeEnd: [1] }
      await cutUploads(remote, { how, toServer, toClient }, { replayable })
    })

    test('a download gives the right bytes or fails', async () => {
      const target = await beginRemote(remote)
      const bytes = cutBytes(remote)
      await place(target, 'a/object', bytes)
      const cuts = { how, toClient: { even: 4, beforeEnd: [1] } } as const
      const all = { start: 0, end: bytes.length }
      const middle = { start: 1001, end: bytes.length - 1001 }
      for (const range of brief ? [all] : [all, middle]) {
        await cutDownloads(target, remote, { key: 'a/object', range, cuts })
      }
      await expectStored(target, 'a/object', bytes)
    })

    test('a call gives the right answer or fails', async () => {
      const target = await beginRemote(remote)
      const toClient = { even: brief ? 1 : 3, beforeEnd: [1] }
      await forEachAnswer(target, remote, (call, look) =>
        cutCalls(target, remote, { how, toClient }, call, look),
      )
    })
  })
}
