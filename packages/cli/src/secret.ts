import { readFile } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { errorMessage, VarveError } from '@varve/core'
import { z } from 'zod'

/** A secret in the configuration: itself, the name of an environment variable, or a file that holds it. */
export type Secret = string | { readonly env: string } | { readonly file: string }

const text = z.string().min(1, 'must not be empty')

/** The schema of a {@link Secret}, for the options of a storage. */
export const secretField: z.ZodType<Secret> = z.union(
  [text, z.strictObject({ env: text }), z.strictObject({ file: text })],
  { error: 'expected text, { "env": "NAME" } or { "file": "path" }' },
)

/** Where a secret stands, for {@link readSecret}. */
export interface SecretPlace {
  /** The configuration file; a relative `file` begins at its folder. */
  readonly configPath: string
  /** The field, such as `storages.nas.password`. */
  readonly field: string
  readonly env: Readonly<Record<string, string | undefined>>
}

/**
 * The value of a secret. Line ends at the end of a file are no part of it.
 *
 * @throws INVALID_CONFIG, which names the field and where it was looked for, never the value
 */
export async function readSecret(secret: Secret, place: SecretPlace): Promise<string> {
  const { configPath, field, env } = place
  const refuse = (what: string, cause?: unknown) =>
    new VarveError('INVALID_CONFIG', `${configPath}: ${field}: ${what}`, {
      context: { path: configPath, field },
      cause,
    })
  if (typeof secret === 'string') return secret
  if ('env' in secret) {
    const value = env[secret.env]
    if (!value) throw refuse(`the environment variable ${secret.env} is not set. Set it and try again.`)
    return value
  }
  const path = resolve(dirname(configPath), secret.file)
  const content = await readFile(path, 'utf8').catch(error => {
    throw refuse(
      `the secret's file cannot be read: ${errorMessage(error)}. Make it, or correct its path.`,
      error,
    )
  })
  const value = content.replace(/[\r\n]+$/, '')
  if (value === '') throw refuse(`the secret's file ${path} is empty.`)
  return value
}
