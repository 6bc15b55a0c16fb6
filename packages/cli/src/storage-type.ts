import type { StorageDriver } from '@varve/core'
import type { z } from 'zod'
import type { Secret } from './secret.ts'

/** Gives the value of a secret among a storage's options; `name` is the option's. */
export type SecretReader = (name: string, secret: Secret) => Promise<string>

/** Makes the driver of one storage. */
export type StorageOpener = (secrets: SecretReader) => Promise<StorageDriver>

/** A kind of storage: what its entry in the configuration looks like, and how its driver is made. */
export interface StorageType {
  /** Checks an entry, without its `type`. */
  check(entry: unknown): { readonly open: StorageOpener } | { readonly issues: readonly z.core.$ZodIssue[] }
}

/**
 * Makes a {@link StorageType}. `open` imports its driver when it is called, so that the dependencies of a
 * driver are loaded only where it is used.
 */
export function storageType<Options>(
  options: z.ZodType<Options>,
  open: (options: Options, secrets: SecretReader) => Promise<StorageDriver>,
): StorageType {
  return {
    check(entry) {
      const parsed = options.safeParse(entry)
      return parsed.success
        ? { open: secrets => open(parsed.data, secrets) }
        : { issues: parsed.error.issues }
    },
  }
}
