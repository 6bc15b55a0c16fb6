import { z } from 'zod'
import type { JournalHeader, JournalStep, JournalStepName, JournalStepOf } from './journal.ts'

const text = z.string()
const texts = z.array(text)
const nothing = z.object({})

const imageDisk = z.union([text, z.object({ path: text, format: z.enum(['qcow2', 'raw']) })])

const header: z.ZodType<JournalHeader> = z.object({
  version: z.literal(1),
  id: text,
  kind: z.enum(['backup', 'restore']),
  instance: text,
  uuid: text.exactOptional(),
  host: z.discriminatedUnion('kind', [
    z.object({ kind: z.literal('libvirt'), uri: text }),
    z.object({ kind: z.literal('image'), instance: text, disks: z.record(text, imageDisk) }),
  ]),
  storage: z.object({ type: text, location: text }),
  disks: z.array(z.object({ name: text, path: text })),
  startedAt: text,
})

const fileState = z.object({ identity: text, writtenAt: text })
const imageState = z.object({ id: text, writtenAt: text.exactOptional() })
const of = z.object({ instance: text, disk: text }).exactOptional()
const overwritten = z.object({
  disk: text,
  path: text,
  identity: text.exactOptional(),
  folder: text.exactOptional(),
  of,
})
const targetImage = { image: text, of }

/** What each step tells, besides its name. */
const details: { [S in JournalStepName]: z.ZodType<Omit<JournalStepOf<S>, 'step'>> } = {
  'bitmap-add': z.object({ bitmap: text, disks: texts }),
  'filesystem-freeze': nothing,
  'filesystem-thawed': nothing,
  suspend: nothing,
  snapshot: z.object({
    overlays: z.array(
      z.object({
        disk: text,
        overlay: text,
        base: text,
        baseFormat: z.enum(['qcow2', 'raw']),
        definition: text.exactOptional(),
        device: text.exactOptional(),
        folder: text.exactOptional(),
      }),
    ),
  }),
  frozen: z.object({ bases: z.array(fileState.extend({ overlay: text })) }),
  'rbd-snapshot': z.object({ snapshot: text, disks: z.array(z.object({ disk: text, image: text })) }),
  resumed: nothing,
  export: z.object({ folder: text }),
  upload: z.object({ folder: text }),
  publish: z.object({
    manifest: text,
    size: z.number(),
    blake3: text,
    parent: text.exactOptional(),
    retire: z.record(text, texts),
    retireSnapshots: z.record(text, texts).exactOptional(),
  }),
  published: nothing,
  merging: z.object({ overlay: text }),
  pivot: z.object({ overlay: text }),
  merged: z.object({ overlay: text }),
  unmerged: z.object({ overlay: text }),
  define: z.object({ instance: text, xml: text }),
  'drop-backing': z.object({ instance: text, disks: texts }),
  'power-off': z.object({
    instance: text,
    wasRunning: z.boolean(),
    start: z.boolean(),
    timeoutMs: z.number(),
  }),
  'powered-off': nothing,
  'target-create': z.object({ temporary: text, folder: text.exactOptional() }),
  'image-create': z.object(targetImage),
  'mark-incomplete': overwritten.extend({ mark: text, former: texts }),
  'write-in-place': overwritten,
  'written-in-place': nothing,
  incomplete: z.object({ disks: texts }),
  finish: z.object({
    renames: z.array(
      z.object({
        temporary: text,
        target: text,
        identity: text.exactOptional(),
        replaces: fileState.exactOptional(),
        isNew: z.boolean().exactOptional(),
      }),
    ),
    images: z
      .array(
        z.object({
          ...targetImage,
          target: text,
          id: text,
          replaces: imageState.exactOptional(),
          isNew: z.boolean().exactOptional(),
        }),
      )
      .exactOptional(),
  }),
  defined: nothing,
  undo: nothing,
}

const stepName = z.object({ step: z.string().refine(isStep, 'is no step') })

function isStep(name: string): name is JournalStepName {
  return Object.hasOwn(details, name)
}

/** The first line of a journal. @throws what is not as it should be */
export function parseHeader(line: unknown): JournalHeader {
  return header.parse(line)
}

/** One of the other lines. @throws what is not as it should be */
export function parseStep(line: unknown): JournalStep {
  const { step } = stepName.parse(line)
  // A name with its own details, which TypeScript cannot tell.
  return { step, ...details[step].parse(line) } as JournalStep
}
