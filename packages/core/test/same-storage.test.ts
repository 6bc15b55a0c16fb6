import { expect, test } from 'vitest'
import { isSameStorage } from '../src/same-storage.ts'

test.each<[string, string, string, boolean]>([
  ['local', '/mnt/backup', '/mnt/backup/', true],
  ['local', '/mnt/backup', '/mnt/backup2', false],
  ['sftp', 'sftp://one@nas:22/backups', 'sftp://one@nas:22/backups/', true],
  ['sftp', 'sftp://one@nas:22', 'sftp://one@nas:22//', false], // the folder of the login, and the server's root
  ['sftp', 'sftp://one@nas:22/srv', 'sftp://one@nas:22//srv', false],
  ['ftp', 'ftps://one@nas:21/', 'ftps://one@nas:21//', false],
  ['ftp', 'ftps://one@nas:21/srv', 'ftps://one@nas:21//srv', false],
  ['rclone', 'rclone nas:', 'rclone nas:/', false],
  ['custom', 'tapes', 'tapes/', true],
  ['sftp', 'sftp://one@nas:22/backups', 'sftp://one@nas:22/backups', true],
  ['sftp', 'sftp://one@nas:22/backups', 'sftp://two@nas:22/backups', false],
  ['ftp', 'ftps://one@nas:21/', 'ftps://two@nas:21/', false],
  ['sftp', 'sftp://one@nas:22/backups', 'sftp://nas:22/backups', true], // as it was recorded before
  ['ftp', 'ftps://nas:21/', 'ftps://one@nas:21/', true],
  ['ftp', 'ftps://nas:21/srv', 'ftps://one@nas:21//srv', true],
  ['ftp', 'ftps://nas:21/srv', 'ftps://one@nas:21/srv', true],
  ['sftp', 'sftp://nas:22/srv', 'sftp://one@nas:22//srv', false],
  ['sftp', 'sftp://one@nas:22/a@b', 'sftp://one@nas:22/b', false],
  ['sftp', 'sftp://nas:22/a@b', 'sftp://nas:22/b', false],
])('of the kind %s, %s and %s are one storage: %s', (type, one, other, same) => {
  expect(isSameStorage({ type, location: one }, { type, location: other })).toBe(same)
  expect(isSameStorage({ type, location: one }, { type: 'other', location: one })).toBe(false)
})
