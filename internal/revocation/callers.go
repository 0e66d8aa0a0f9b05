// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Caller is somebody with open requests.
type Caller struct {
	// Remote is the address of the caller, Local the one that it dialled.
	Remote, Local netip.Addr
	// Identity is who it was when the latest of them began.
	Identity *impersonate.Identity
	// Open is how many are open, by kind.
	Open map[Kind]int
}

// Callers returns everybody with open requests in this process, by address. What
// began under an earlier config is among it.
func Callers() []Caller {
	var callers []Caller
	// Two tailnets may have given the same addresses to different devices.
	type device struct {
		caller
		name string
	}
	index := make(map[device]int)
	mu.Lock()
	for _, s := range current {
		for r := s.open; r != nil; r = r.next {
			key := device{caller{r.conn.Remote.Addr(), r.conn.Local}, r.ID.Node}
			i, ok := index[key]
			if !ok { // and the list begins with the latest
				i, index[key] = len(callers), len(callers)
				callers = append(callers, Caller{Remote: key.remote, Local: key.local, Identity: r.ID, Open: make(map[Kind]int)})
			}
			callers[i].Open[r.kind]++
		}
	}
	mu.Unlock()
	slices.SortFunc(callers, func(a, b Caller) int {
		return cmp.Or(a.Remote.Compare(b.Remote), a.Local.Compare(b.Local))
	})
	return callers
}

// Drop ends all requests of the device of that name at remote that dialled local, for
// the reason that detail gives in full. It returns how many, by kind.
func Drop(remote, local netip.Addr, device, detail string) map[Kind]int {
	dropped := make(map[Kind]int)
	ended := &Ended{Reason: Dropped, Detail: detail, Remote: remote}
	conns := make(map[*tailnet.Conn]bool)
	var told func(*Ended)
	mu.Lock()
	for _, s := range current {
		for r := s.open; r != nil; r = r.next {
			if r.ended || r.conn.Remote.Addr() != remote || r.conn.Local != local || r.ID.Node != device {
				continue
			}
			r.ended = true
			ended.User = r.ID.User
			ended.Requests++
			dropped[r.kind]++
			conns[r.conn] = true
			told = s.rules[0].Ended
		}
	}
	mu.Unlock()
	for conn := range conns {
		conn.End(ended)
	}
	if told != nil {
		told(ended)
	}
	return dropped
}
