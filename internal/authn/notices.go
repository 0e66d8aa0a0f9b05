// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"fmt"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// notices are the last notices in the log, by what they are about. A peer is looked up every
// second, and the log says once what stays the same.
type notices struct {
	logged *lru.Cache[subject, string]
}

// subject is what notices are about: something about a peer.
type subject struct {
	peerKey
	what string
}

func newNotices() (*notices, error) {
	logged, err := lru.New[subject, string](cacheSize)
	return &notices{logged}, err
}

// isNew reports whether notices about a subject, which is peer's, have to be logged:
// whether there are any, and they are not those that were logged last.
func (n *notices) isNew(about subject, peer impersonate.Peer, notices []string) bool {
	if len(notices) == 0 {
		n.logged.Remove(about)
		return false
	}
	text := fmt.Sprintf("%s %q", peer.NodeID, notices) // an address can move to another device
	if last, ok, _ := n.logged.PeekOrAdd(about, text); !ok {
		return true
	} else if last == text {
		return false
	}
	n.logged.Add(about, text)
	return true
}
