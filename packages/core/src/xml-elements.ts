import { DOMParser, type Document, type Element, XMLSerializer } from '@xmldom/xmldom'
import { VarveError } from './errors.ts'

/** A parsed definition of a domain. */
export interface DomainDocument {
  readonly document: Document
  /** The element `domain`. */
  readonly root: Element
}

/** @throws INVALID_ARGUMENT for what is no domain's XML */
export function parseDomain(xml: string): DomainDocument {
  const document = parse(xml)
  const root = document.documentElement
  if (root?.tagName !== 'domain') throw new VarveError('INVALID_ARGUMENT', 'This is no libvirt domain XML.')
  return { document, root }
}

/** The text of a document. */
export function serializeXml(document: Document): string {
  return new XMLSerializer().serializeToString(document)
}

function parse(xml: string): Document {
  try {
    return new DOMParser({
      onError: (level, message) => {
        if (level !== 'warning') throw new Error(message)
      },
    }).parseFromString(xml, 'text/xml')
  } catch (error) {
    throw new VarveError('INVALID_ARGUMENT', 'The domain XML cannot be parsed.', { cause: error })
  }
}

/** The elements of a name right below an element. */
export function children(element: Element | undefined, name: string): Element[] {
  if (!element) return []
  return Array.from(element.getElementsByTagName(name)).filter(found => found.parentNode === element)
}

/** The first one of {@link children}. */
export function child(element: Element | undefined, name: string): Element | undefined {
  return children(element, name)[0]
}

/** What is written in an element, without the space around it. */
export function text(element: Element | undefined): string | undefined {
  const content = element?.textContent?.trim()
  return content ? content : undefined
}

/** Takes an element out of its document. */
export function remove(element: Element | undefined): void {
  element?.parentNode?.removeChild(element)
}
