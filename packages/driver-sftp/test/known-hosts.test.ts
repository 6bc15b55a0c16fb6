import { createHmac, randomBytes } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { fingerprintOf, keyTypeOf } from '../src/host-key.ts'
import { knownHosts } from '../src/known-hosts.ts'

const KEY = 'AAAAC3NzaC1lZDI1NTE5AAAAIK0wmN/Cr3JXqmLW7u+g9pTh+wyqDHpSQEIQczXkVx9q'
const line = (hosts: string, marker = '') => `${marker}${hosts} ssh-ed25519 ${KEY} a comment`

describe('a known_hosts file', () => {
  test.each([
    ['backup.example', 'backup.example', 22],
    ['other.example,backup.example', 'backup.example', 22],
    ['[backup.example]:2222', 'backup.example', 2222],
    ['*.example', 'backup.example', 22],
    ['back?p.example', 'backup.example', 22],
    ['BACKUP.example', 'backup.EXAMPLE', 22],
    ['*', 'backup.example', 22],
    ['2001:db8::1', '2001:db8::1', 22],
  ])('has a key under %s for %s at port %i', (hosts, host, port) => {
    expect(knownHosts(`# comment\n\n${line(hosts)}\n`, host, port)).toEqual([
      { revoked: false, type: 'ssh-ed25519', key: Buffer.from(KEY, 'base64') },
    ])
  })

  test.each([
    ['backup.example', 'backup2.example', 22],
    ['backup.example', 'backup.example', 2222],
    ['[backup.example]:2222', 'backup.example', 22],
    ['*.example,!backup.example', 'backup.example', 22],
    ['backupXexample', 'backup.example', 22],
    ['#backup.example', 'backup.example', 22],
  ])('has no key under %s for %s at port %i', (hosts, host, port) => {
    expect(knownHosts(line(hosts), host, port)).toEqual([])
  })

  test('may hide the name behind a hash', () => {
    const salt = randomBytes(20)
    const hash = createHmac('sha1', salt).update('[backup.example]:2222').digest('base64')
    const content = line(`|1|${salt.toString('base64')}|${hash}`)
    expect(knownHosts(content, 'backup.example', 2222)).toHaveLength(1)
    expect(knownHosts(content, 'backup.example', 22)).toEqual([])
  })

  test('tells which keys are revoked, and certificate authorities are no keys of hosts', () => {
    expect(knownHosts(line('*', '@revoked '), 'backup.example', 22)).toMatchObject([{ revoked: true }])
    expect(knownHosts(line('*', '@cert-authority '), 'backup.example', 22)).toEqual([])
  })
})

test('a fingerprint is the one that ssh-keygen shows', () => {
  const key = Buffer.from(KEY, 'base64')
  expect(fingerprintOf(key)).toBe('SHA256:FHsTyFHNmvNpw4o7+rp+M1yqMyBF8vXSBRkZtkQ0RKY')
  expect(keyTypeOf(key)).toBe('ssh-ed25519')
})
