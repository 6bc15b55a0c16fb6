import { errorMessage, isVarveError, VarveError } from '@varve/core'
import { isTransient, statusOf } from './retrying.ts'

/** What is done with the storage, for messages. */
export interface S3Action {
  /** Such as `Writing a/b`. */
  readonly doing: string
  /** The permission that it needs, as in a policy: `s3:PutObject`. */
  readonly permission: string
}

const WRONG_CREDENTIALS = new Set([
  'InvalidAccessKeyId',
  'SignatureDoesNotMatch',
  'ExpiredToken',
  'ExpiredTokenException',
  'InvalidToken',
  'TokenRefreshRequired',
  'InvalidClientTokenId',
  'UnrecognizedClientException',
  'AuthorizationHeaderMalformed',
  'CredentialsProviderError',
])
const DENIED = new Set(['AccessDenied', 'AllAccessDisabled', 'AccountProblem', 'Forbidden', '403'])
const FULL = new Set([
  'QuotaExceeded',
  'InsufficientStorage',
  'XMinioStorageFull',
  'InsufficientStorageSpace',
])
const WRONG_REGION = new Set(['PermanentRedirect', 'IllegalLocationConstraintException', '301'])

/** What a request is refused with that has no checksum, among others. */
const NO_CHECKSUM = new Set(['InvalidRequest', 'MissingContentMD5'])

/** An error of the SDK or the network as one that says what was done, where, and what to do now. */
export function s3Error(error: unknown, { doing, permission }: S3Action, location: string): VarveError {
  if (isVarveError(error)) return error
  const name = error instanceof Error ? error.name : 'Error'
  const status = statusOf(error)
  const what = `${doing} in ${location} failed`
  const options = {
    context: { location, reason: systemCode(error) ?? name, status },
    // The SDK's own error holds the answer, with what was signed and by which key.
    cause: new Error(`${name}: ${errorMessage(error)}`),
    retryable: isTransient(error),
  }
  const make = (code: VarveError['code'], why: string) => new VarveError(code, `${what}: ${why}`, options)

  if (status === undefined && name !== 'CredentialsProviderError') {
    const why = unreachable(error)
    if (why) return make('STORAGE_UNREACHABLE', why)
    return make(
      'STORAGE_FAILED',
      `${errorMessage(error)}. Look at the server's log, and at what is between it and this host.`,
    )
  }
  if (name === 'NoSuchBucket') {
    return make('STORAGE_NOT_FOUND', 'the bucket is not there. Make it, or correct its name.')
  }
  if (WRONG_CREDENTIALS.has(name)) {
    return make(
      'STORAGE_ACCESS_DENIED',
      `the credentials are refused (${name}). Check the access key, the secret key, the session token and the region.`,
    )
  }
  if (WRONG_REGION.has(name) || status === 301) {
    return make('STORAGE_NOT_FOUND', 'the bucket is in another region. Correct the region or the endpoint.')
  }
  if (FULL.has(name) || status === 507) {
    return make(
      'STORAGE_FULL',
      `the storage or its quota is full (${name}). Delete or prune backups, or add space.`,
    )
  }
  if (DENIED.has(name) || status === 401 || status === 403) {
    return make(
      'STORAGE_ACCESS_DENIED',
      `there is no permission (${name}). Allow ${permission} to this user, by its policy and the bucket's.`,
    )
  }
  if (status === 411 || status === 501) {
    return make(
      'STORAGE_FAILED',
      `the server does not know this kind of upload (${name}). Set checksums to WHEN_REQUIRED.`,
    )
  }
  if (status === 400 && NO_CHECKSUM.has(name) && /content-md5|x-amz-checksum/i.test(errorMessage(error))) {
    return make(
      'STORAGE_FAILED',
      `the bucket takes no upload without a checksum, as where its objects are locked (${name}). Set checksums to WHEN_SUPPORTED.`,
    )
  }
  const again = options.retryable ? 'The storage is busy or has a fault; try again later' : 'Look at its log'
  return make(
    'STORAGE_FAILED',
    `${name}${status ? ` (HTTP ${status})` : ''}: ${errorMessage(error)}. ${again}.`,
  )
}

/** An error of the storage, or an abort, with a word on what it leaves behind; one of the source stays as it is. */
export function withNote(error: VarveError, note: string): VarveError {
  const { code, message, context, retryable, cause } = error
  if (code !== 'ABORTED' && !code.startsWith('STORAGE_')) return error
  return new VarveError(code, `${message.replace(/\.?$/, '.')} ${note}`, { context, retryable, cause })
}

/** Why a server cannot be reached, and what to do; undefined for an error that has nothing to do with that. */
function unreachable(error: unknown): string | undefined {
  const code = systemCode(error) ?? ''
  if (code === 'ENOTFOUND') return 'the host is unknown. Correct the endpoint, or look at the name service.'
  if (code === 'EAI_AGAIN') return 'the name service does not answer. Look at the network.'
  if (code === 'ECONNREFUSED') return 'the connection was refused. Start the server, or correct the port.'
  if (code === 'ETIMEDOUT') return `timeout: ${errorMessage(error)}. Look at the server and the network.`
  if (code === 'EHOSTUNREACH' || code === 'ENETUNREACH')
    return 'there is no route to the host. Look at the network.'
  if (isTlsCode(code)) {
    return `TLS: ${errorMessage(error)} (${code}). Give the server's authority as ca, or correct the endpoint.`
  }
  if (isTransient(error)) return `the connection was cut (${code}). Look at the server and the network.`
  return undefined
}

function isTlsCode(code: string): boolean {
  return (
    code === 'EPROTO' ||
    code.startsWith('ERR_TLS') ||
    code.startsWith('ERR_SSL') ||
    code.startsWith('CERT_') ||
    /^(DEPTH_ZERO_)?SELF_SIGNED_CERT|^UNABLE_TO_|^HOSTNAME_MISMATCH/.test(code)
  )
}

function systemCode(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : undefined
}
