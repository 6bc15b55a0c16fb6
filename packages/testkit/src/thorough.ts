import { test } from 'vitest'

/** Whether all tests run, however long they take: with `VARVE_THOROUGH=1` in the environment, as `npm run test:thorough` sets it. */
export const isThorough: boolean = process.env.VARVE_THOROUGH === '1'

/**
 * A test of {@link isThorough} alone: the suite has another one that goes through most of the same code. Whole files of them are
 * `*.thorough.test.ts`.
 */
export const thoroughTest: (name: string, work: () => Promise<void>) => void = isThorough
  ? test
  : () => undefined
