import { errorMessage, isVarveError, VarveError } from './errors.ts'
import type { PutOptions } from './storage.ts'

/**
 * Has an upload fail with what its caller's `onProgress` throws, as it was thrown. The driver stores with options whose
 * `onProgress` throws `UPLOAD_FAILED` instead, which it takes for a failed source: it tries nothing again, and cleans up.
 *
 * @param store stores the object; what it returns or throws comes through, unless `onProgress` threw
 */
export async function failsWithProgress<T>(
  options: PutOptions,
  store: (options: PutOptions) => Promise<T>,
): Promise<T> {
  const { onProgress } = options
  if (!onProgress) return store(options)
  let thrown: { error: unknown } | undefined
  const report = (bytes: number): void => {
    try {
      onProgress(bytes)
    } catch (error) {
      thrown ??= { error }
      throw new VarveError('UPLOAD_FAILED', `onProgress failed: ${errorMessage(error)}.`, { cause: error })
    }
  }
  try {
    return await store({ ...options, onProgress: report })
  } catch (error) {
    throw thrown && !isVarveError(error, 'ABORTED') ? thrown.error : error
  }
}
