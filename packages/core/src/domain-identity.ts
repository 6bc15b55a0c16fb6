import type { Element } from '@xmldom/xmldom'
import { child, children, remove, removeChildren } from './xml-elements.ts'

/** Character devices whose host's end names something that only one domain can have. */
const EXCLUSIVE_ENDS = new Set(['file', 'pipe', 'unix', 'tcp', 'udp'])

/**
 * Takes out of a domain's definition all that a copy beside the original must not have too, so that libvirt
 * chooses anew: UUID, generation id, MAC addresses and network devices; fixed ports and sockets of displays; a
 * fixed vsock address; files, sockets and ports at the host's end of character devices, where a copy would
 * take the socket of the original's guest agent away. (libvirt's "Domain XML format".)
 */
export function dropIdentity(root: Element): void {
  removeChildren(root, 'uuid')
  const generation = child(root, 'genid')
  if (generation) generation.textContent = ''
  for (const system of children(child(root, 'sysinfo'), 'system')) {
    // libvirt refuses one that is not the domain's.
    for (const entry of children(system, 'entry')) if (entry.getAttribute('name') === 'uuid') remove(entry)
  }
  const devices = child(root, 'devices')
  for (const network of children(devices, 'interface')) {
    removeChildren(network, 'mac')
    removeChildren(network, 'target')
  }
  for (const display of children(devices, 'graphics')) freeDisplay(display)
  for (const vsock of children(devices, 'vsock')) {
    const address = child(vsock, 'cid')
    address?.setAttribute('auto', 'yes')
    address?.removeAttribute('address')
  }
  for (const kind of ['serial', 'parallel', 'console', 'channel']) {
    for (const device of children(devices, kind)) freeHostEnd(device)
  }
}

function freeDisplay(display: Element): void {
  const wasFixed = ['port', 'tlsPort', 'websocket', 'socket'].filter(name => display.hasAttribute(name))
  for (const name of wasFixed) display.removeAttribute(name)
  if (wasFixed.length > 0) display.setAttribute('autoport', 'yes')
  for (const listen of children(display, 'listen')) listen.removeAttribute('socket')
}

function freeHostEnd(device: Element): void {
  removeChildren(device, 'log')
  const type = device.getAttribute('type') ?? ''
  if (!EXCLUSIVE_ENDS.has(type)) return
  for (const name of ['source', 'protocol']) for (const found of children(device, name)) remove(found)
  // Of a channel's Unix socket libvirt chooses the path; no other end does without a source.
  if (device.tagName !== 'channel' || type !== 'unix') device.setAttribute('type', 'pty')
}
