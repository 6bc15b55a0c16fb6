const { VARVE_FUZZ_RUNS } = process.env
const wanted = VARVE_FUZZ_RUNS === undefined ? undefined : Number(VARVE_FUZZ_RUNS)

/**
 * Options of a property of fast-check that mangles the input of a parser: `few` runs in the suite, `VARVE_FUZZ_RUNS`
 * where that is set. A failing run prints its seed and path, which `seed` and `path` of these options replay.
 */
export function fuzz(few: number): { numRuns: number } {
  return { numRuns: wanted ?? few }
}

/** How long such a test may take, in milliseconds. */
export const FUZZ_TIMEOUT_MS: number = wanted === undefined ? 120_000 : 6 * 60 * 60_000
