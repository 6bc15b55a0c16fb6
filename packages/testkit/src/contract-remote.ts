import { describe } from 'vitest'
import {
  describeCutCalls,
  describeCutDownloads,
  describeCutReplacements,
  describeCutUploads,
} from './contract-cuts.ts'
import { describeEarlyEnds } from './contract-early-ends.ts'
import { describePauses, describeSlowness } from './contract-patience.ts'
import { describeRefusal } from './contract-refusal.ts'
import { describeRestart } from './contract-restart.ts'
import { describeSilence } from './contract-silence.ts'
import { describeStaging } from './contract-staging.ts'
import { type Contract, type RemotePart, tries } from './contract-target.ts'
import type { Remote } from './remote-target.ts'

/** At the beginning or in the middle, near the end, and behind it. */
const BRIEF_CUTS = 3

/** A storage that is reached over a network: all that can happen on the way, and to the server. */
export function describeRemote(contract: Contract): void {
  if (contract.remote === undefined) return
  const remote: Remote = {
    idleTimeoutMs: 1500,
    keepsConnections: true,
    cutSize: 1_000_003,
    resumeSize: contract.largeSize,
    mostCuts: contract.brief ? BRIEF_CUTS : Number.POSITIVE_INFINITY,
    ...contract.remote,
  }
  const blocks: [RemotePart, () => void][] = [
    ['cut uploads', () => describeCutUploads(contract, remote)],
    ['cut replacements', () => describeCutReplacements(contract, remote)],
    ['cut downloads', () => describeCutDownloads(contract, remote)],
    ['cut calls', () => describeCutCalls(contract, remote)],
    ['early ends', () => describeEarlyEnds(contract, remote)],
    ['silence', () => describeSilence(contract, remote)],
    ['slowness', () => describeSlowness(contract, remote)],
    ['pauses', () => describePauses(contract, remote)],
    ['refusal', () => describeRefusal(contract, remote)],
    ['restart', () => describeRestart(contract, remote)],
    ['staging', () => describeStaging(contract, remote)],
  ]
  describe('over a network', () => {
    for (const [part, declare] of blocks) if (tries(contract, part)) declare()
  })
}
