// Checks what each package publishes: that its `exports` and files are right, and that its types are found from ES modules
// and bundlers. All in one process, as most of the time goes into starting npm and TypeScript.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { checkPackage, createPackageFromTarballData, type Problem } from '@arethetypeswrong/core'
import { problemKindInfo } from '@arethetypeswrong/core/problems'
import { execa } from 'execa'
import { publint } from 'publint'
import { formatMessage } from 'publint/utils'

/** How nobody finds a package that has ES modules only. */
const OLD_RESOLUTIONS = ['node10', 'node16-cjs']
/** Has a command and nothing to import. */
const UNTYPED = '@varve/cli'

const folder = await mkdtemp(join(tmpdir(), 'varve-exports-'))
try {
  const { stdout } = await execa('npm', ['pack', '--workspaces', '--json', '--pack-destination', folder])
  for (const { name, filename } of JSON.parse(stdout) as { name: string; filename: string }[]) {
    const tarball = Uint8Array.from(await readFile(join(folder, filename)))
    const faults = [
      ...(await publishingFaults(tarball)),
      ...(name === UNTYPED ? [] : await typeFaults(tarball)),
    ]
    for (const fault of faults) console.error(`${name}: ${fault}`)
    if (faults.length > 0) process.exitCode = 1
  }
} finally {
  await rm(folder, { recursive: true })
}

async function publishingFaults({ buffer }: Uint8Array<ArrayBuffer>): Promise<string[]> {
  const { messages, pkg } = await publint({ pack: { tarball: buffer }, level: 'warning', strict: true })
  return messages.map(message => formatMessage(message, pkg) ?? message.code)
}

async function typeFaults(tarball: Uint8Array): Promise<string[]> {
  const analysis = await checkPackage(createPackageFromTarballData(tarball))
  if (!analysis.types) return ['It has no types']
  return analysis.problems.filter(isOfToday).map(({ kind, ...where }) => {
    return `${problemKindInfo[kind].description} ${JSON.stringify(where)}`
  })
}

function isOfToday(problem: Problem): boolean {
  return !('resolutionKind' in problem) || !OLD_RESOLUTIONS.includes(problem.resolutionKind)
}
