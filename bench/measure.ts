import { fileURLToPath } from 'node:url'
import { execa } from 'execa'

/** One timed run. */
export interface Run {
  readonly seconds: number
  /** Peak resident memory of a Varve process, in MiB. */
  readonly peakMiB?: number
  /** Peak resident memory of an rclone that it ran, in MiB. */
  readonly childMiB?: number
}

/** Times an external program, from its start to its end; with `env`, in that environment alone. */
export async function timeCommand(
  command: string,
  args: readonly string[],
  { env, inputFile }: { env?: Record<string, string>; inputFile?: string } = {},
): Promise<Run> {
  const start = performance.now()
  await execa(command, args, {
    stdout: 'ignore',
    ...(inputFile === undefined ? { stdin: 'ignore' } : { stdin: { file: inputFile } }),
    ...(env && { env, extendEnv: false }),
  })
  return { seconds: (performance.now() - start) / 1000 }
}

/**
 * Runs one of the tasks of `task.ts` in a fresh process and returns what it measured: the time of the call
 * into the SDK, and the peak memory of the whole process.
 */
export async function runTask(task: string, input: object): Promise<Run & Record<string, unknown>> {
  const file = fileURLToPath(new URL('./task.ts', import.meta.url))
  const { stdout } = await execa(process.execPath, ['--import', 'tsx', file, task], {
    input: JSON.stringify(input), // it may hold a password, which no command line shows
  })
  return JSON.parse(stdout.trim().split('\n').at(-1) ?? '')
}

/** The middle of several figures. */
export function median(figures: readonly number[]): number {
  const sorted = [...figures].sort((a, b) => a - b)
  const middle = Math.floor(sorted.length / 2)
  const upper = sorted[middle] ?? Number.NaN
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? Number.NaN)) / 2
}

/** Runs two measures in turn, A B A B …, and returns both lists of runs. */
export async function alternate(
  pairs: number,
  a: () => Promise<Run>,
  b: () => Promise<Run>,
): Promise<{ a: Run[]; b: Run[] }> {
  const runs: { a: Run[]; b: Run[] } = { a: [], b: [] }
  for (let pair = 0; pair < pairs; pair++) {
    runs.a.push(await a())
    runs.b.push(await b())
  }
  return runs
}

/** The median of the ratios A/B, pair by pair. */
export function ratio(runs: { a: readonly Run[]; b: readonly Run[] }): number {
  return median(runs.a.map((run, pair) => run.seconds / (runs.b[pair]?.seconds ?? Number.NaN)))
}
