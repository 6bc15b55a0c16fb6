import { abortError, failsWithProgress, isVarveError, VarveError } from '@varve/core'
import { expect, test } from 'vitest'

const boom = new Error('boom')
const onProgress = () => {
  throw boom
}

test('what onProgress throws is what the upload fails with, and to the driver a source that failed', async () => {
  let seen: unknown
  const upload = failsWithProgress({ onProgress }, async options => {
    try {
      options.onProgress?.(1)
    } catch (error) {
      seen = error
      throw new VarveError('STORAGE_FAILED', 'Not removed.', { cause: error })
    }
  })
  await expect(upload).rejects.toBe(boom)
  expect(isVarveError(seen, 'UPLOAD_FAILED')).toBe(true)
  expect(seen).toMatchObject({ cause: boom, retryable: false })
})

test('without a throw the outcome and the options come through', async () => {
  const bytes: number[] = []
  const signal = AbortSignal.abort()
  const given = await failsWithProgress({ signal, onProgress: n => bytes.push(n) }, async options => {
    options.onProgress?.(7)
    return options.signal
  })
  expect(given).toBe(signal)
  expect(bytes).toEqual([7])
  const failure = new VarveError('STORAGE_FULL', 'Full.')
  await expect(failsWithProgress({}, () => Promise.reject(failure))).rejects.toBe(failure)
})

test('an abort comes before what onProgress threw', async () => {
  const error = abortError(AbortSignal.abort())
  const upload = failsWithProgress({ onProgress }, async options => {
    expect(() => options.onProgress?.(1)).toThrow()
    throw error
  })
  await expect(upload).rejects.toBe(error)
})
