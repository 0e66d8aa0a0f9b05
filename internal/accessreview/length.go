// SPDX-License-Identifier: Apache-2.0

package accessreview

import (
	"errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// maxAttribute is the length of the longest part of a path that reviews are sent about, in
// bytes. Names of objects have at most 253. A part cannot be cut: the permission would be
// another one. It is sent in several reviews, and is a part of the keys of the cache.
const maxAttribute = 512

var errTooLong = errors.New("the request's path is too long for a review")

// tooLong reports whether a permission that a request needs has too long a part.
func tooLong(i requestinfo.Info) bool {
	if !i.IsResourceRequest {
		return len(i.Verb) > maxAttribute || len(i.Path) > maxAttribute
	}
	return max(len(i.Verb), len(i.APIGroup), len(i.APIVersion), len(i.Resource), len(i.Subresource), len(i.Namespace), len(i.Name)) > maxAttribute
}
