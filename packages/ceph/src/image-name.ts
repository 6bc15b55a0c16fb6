import { isRbdImage, VarveError } from '@varve/core'

/** The parts of `<pool>/[<namespace>/]<image>`. */
export interface ImageName {
  readonly pool: string
  readonly namespace?: string
  readonly image: string
}

/** Takes `<pool>/[<namespace>/]<image>` apart. @throws INVALID_ARGUMENT */
export function parseImageName(text: string): ImageName {
  const [pool = '', ...rest] = text.split('/')
  const [image, namespace] = rest.reverse()
  if (!isRbdImage(text) || image === undefined) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `${JSON.stringify(text)} names no RBD image. It is <pool>/<image> or <pool>/<namespace>/<image>, and no name has a "/", an "@" or a control character in it, or a "-" or a space at its beginning.`,
      { context: { image: text } },
    )
  }
  return { pool, ...(namespace !== undefined && { namespace }), image }
}

/**
 * The options of `rbd` that name an image, and a snapshot of it. It takes a name apart at "/" and "@" in these too,
 * so neither may be in one.
 *
 * @throws INVALID_ARGUMENT
 */
export function imageArguments(image: string, snapshot?: string): string[] {
  return [
    ...poolArguments(image),
    `--image=${parseImageName(image).image}`,
    ...(snapshot === undefined ? [] : [`--snap=${checkedSnapshot(snapshot)}`]),
  ]
}

/** The options of `rbd` that name the pool, and the namespace, of an image. @throws INVALID_ARGUMENT */
export function poolArguments(image: string): string[] {
  const { pool, namespace } = parseImageName(image)
  return [`--pool=${pool}`, ...(namespace === undefined ? [] : [`--namespace=${namespace}`])]
}

/** @throws INVALID_ARGUMENT */
export function checkedSnapshot(name: string): string {
  if (isRbdImage(`pool/${name}`) && !name.includes('/')) return name
  throw new VarveError(
    'INVALID_ARGUMENT',
    `An RBD snapshot cannot be called ${JSON.stringify(name)} here. Rename it (rbd snap rename).`,
    { context: { snapshot: name } },
  )
}
