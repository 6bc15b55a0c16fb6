import { describe } from 'vitest'
import { describeCuts } from './contract-cuts.ts'
import { describeEarlyEnds } from './contract-early-ends.ts'
import { describeRefusal } from './contract-refusal.ts'
import { describeRestart } from './contract-restart.ts'
import { describeSilence } from './contract-silence.ts'
import { describeStaging } from './contract-staging.ts'
import { type Contract, type RemotePart, tries } from './contract-target.ts'
import type { Remote } from './remote-target.ts'

/** A storage that is reached over a network: all that can happen on the way, and to the server. */
export function describeRemote(contract: Contract): void {
  if (contract.remote === undefined) return
  const remote: Remote = {
    idleTimeoutMs: 1500,
    keepsConnections: true,
    cutSize: 1_000_003,
    mostCuts: Number.POSITIVE_INFINITY,
    ...contract.remote,
  }
  const blocks: [RemotePart, () => void][] = [
    ['cuts', () => describeCuts(contract, remote)],
    ['early ends', () => describeEarlyEnds(remote)],
    ['silence', () => describeSilence(contract, remote)],
    ['refusal', () => describeRefusal(contract, remote)],
    ['restart', () => describeRestart(contract, remote)],
    ['staging', () => describeStaging(contract, remote)],
  ]
  describe('over a network', () => {
    for (const [part, declare] of blocks) if (tries(contract, part)) declare()
  })
}
