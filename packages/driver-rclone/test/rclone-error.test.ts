import { expect, test } from 'vitest'
import { NO_TEMPORARY_FOLDER, rcloneError, saysMissing } from '../src/rclone-error.ts'

const AT = '2026/11/24 03:59:05 '
const exitOf = (stderr: string, exitCode = 1, command = 'rcat') => ({
  args: [command, 'nas:backups/a/403/vda.qcow2'],
  exitCode,
  stderr,
  unredacted: stderr,
})
const target = 'nas:backups/a/403/vda.qcow2'

// What rclone 1.60 prints, and others of its back ends by their documentation.
test.each([
  [
    'STORAGE_FULL',
    false,
    'ERROR : x: Post request put error: preallocate: file too big for remaining disk space',
  ],
  ['STORAGE_FULL', false, 'Failed to rcat: write /mnt/x: no space left on device'],
  [
    'STORAGE_FULL',
    false,
    'Failed to rcat: googleapi: Error 403: The user has exceeded storage quota, storageQuotaExceeded',
  ],
  ['STORAGE_FULL', false, 'Failed to rcat: write /mnt/x: disk quota exceeded'],
  ['STORAGE_ACCESS_DENIED', false, 'Failed to rcat: AccessDenied: \n\tstatus code: 403, request id: tx01'],
  ['STORAGE_ACCESS_DENIED', false, 'Failed to rcat: SignatureDoesNotMatch: \n\tstatus code: 403'],
  ['STORAGE_ACCESS_DENIED', false, 'Failed to rcat: open /srv/x: permission denied'],
  [
    'STORAGE_ACCESS_DENIED',
    false,
    'Failed to create file system for "nas:": NewFs: couldn\'t connect SSH: ssh: handshake failed: ssh: unable to authenticate, attempted methods [none password]',
  ],
  [
    'STORAGE_ACCESS_DENIED',
    false,
    'Failed to create file system for "nas:": ssh: handshake failed: knownhosts: key mismatch',
  ],
  ['STORAGE_NOT_FOUND', false, 'Failed to rcat: NoSuchBucket: \n\tstatus code: 404'],
  ['STORAGE_UNREACHABLE', true, 'Failed to rcat: dial tcp 127.0.0.1:9: connect: connection refused'],
  ['STORAGE_UNREACHABLE', true, 'Failed to lsjson: dial tcp: lookup nas.invalid: no such host'],
  ['STORAGE_UNREACHABLE', true, 'Failed to rcat: read tcp 127.0.0.1:5->127.0.0.1:9: i/o timeout'],
  [
    'STORAGE_UNREACHABLE',
    true,
    'Failed to rcat: write tcp 127.0.0.1:5->127.0.0.1:9: connection reset by peer',
  ],
  [
    'STORAGE_UNREACHABLE',
    false,
    'Failed to rcat: Get "https://nas/": x509: certificate signed by unknown authority',
  ],
  ['INVALID_CONFIG', false, 'Failed to create file system for "nas:x": didn\'t find section in config file'],
  ['INVALID_CONFIG', false, 'Failed to create file system for "nas:": didn\'t find backend called "tape"'],
  ['STORAGE_FAILED', false, `Failed to rcat: mkdir ${NO_TEMPORARY_FOLDER}: not a directory`],
  ['UPLOAD_FAILED', false, 'Failed to rcat: the moon was in the wrong quarter'],
])('%s, retryable %s: %s', (code, retryable, stderr) => {
  const error = rcloneError(exitOf(AT + stderr), { target, code: 'UPLOAD_FAILED' })
  expect(error).toMatchObject({ name: 'VarveError', code, retryable })
})

test('a failed upload begins with the words that it has always had, and says what happened and what to do', () => {
  const stderr = `${AT}ERROR : x: oh\n${AT}Failed to rcat with 2 errors: last error was: write x: no space left on device`
  const { message } = rcloneError(exitOf(stderr), { target })
  expect(message).toBe(
    `rclone rcat: failed to upload ${target}: write x: no space left on device. Delete or prune backups, or add space.`,
  )
})

test('a message of several lines becomes one', () => {
  const stderr = `${AT}Failed to rcat: RequestError: send request failed\ncaused by: Put "http://127.0.0.1:9/b": dial tcp: connect: connection refused`
  const { message } = rcloneError(exitOf(stderr), { target })
  expect(message).toContain('RequestError: send request failed caused by: Put "http://127.0.0.1:9/b"')
  expect(message).not.toContain('\n')
})

test('words that were taken out as a secret still tell what failed, and are not shown', () => {
  const exit = { ...exitOf('Failed: *** denied'), unredacted: 'Failed: permission denied' }
  const error = rcloneError(exit, { target })
  expect(error.code).toBe('STORAGE_ACCESS_DENIED')
  expect(error.message + JSON.stringify(error.context)).not.toContain('permission denied')
})

test('the words of a path are not taken for what failed', () => {
  const target = 'nas:no space left/access denied/certificate x'
  const stderr = `${AT}ERROR : no space left/access denied/certificate x: Failed: oh\n${AT}Failed to rcat: oh`
  expect(rcloneError(exitOf(stderr), { target })).toMatchObject({ code: 'STORAGE_FAILED' })
})

test('a short path leaves the words alone that hold its letters', () => {
  const stderr = `${AT}Failed to rcat: ssh: unable to authenticate`
  expect(rcloneError(exitOf(stderr), { target: 'nas:a' })).toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
})

test('exit code 5 may go away, 6 and 7 do not', () => {
  const retryable = [5, 6, 7].map(code => rcloneError(exitOf(`${AT}Failed: oh`, code), { target }).retryable)
  expect(retryable).toEqual([true, false, false])
})

test('exit codes 3 and 4 are what is not there, and so is what only deletefile says', () => {
  expect(saysMissing(exitOf('', 3))).toBe(true)
  expect(saysMissing(exitOf('', 4))).toBe(true)
  expect(saysMissing(exitOf(`${AT}Failed to deletefile: nas:x is a directory or doesn't exist`))).toBe(true)
  expect(saysMissing(exitOf(`${AT}Failed to deletefile: permission denied`))).toBe(false)
  expect(saysMissing(exitOf('', 0))).toBe(false)
})

test('a program that is not there is named with the way to get it', () => {
  const exit = { args: ['rcat'], exitCode: undefined, stderr: '', unredacted: '', startError: 'ENOENT' }
  expect(rcloneError(exit, { target })).toMatchObject({
    code: 'COMMAND_MISSING',
    message: expect.stringContaining('Install'),
  })
})

test('an rclone that was killed and said nothing is told of all the same', () => {
  const exit = { args: ['rcat'], exitCode: undefined, stderr: '', unredacted: '' }
  expect(rcloneError(exit, { target }).message).toContain('it ended with a signal')
})
