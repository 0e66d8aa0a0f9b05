// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"net/netip"
	"sync"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn/ipnext"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	"tailscale.com/types/logger"
)

// A node of this process is asked without its LocalAPI, which is HTTP and the JSON of all
// that the node knows about the peer: most of what a new connection cost. The methods
// below are those that LocalAPI itself asks, so the answers are the same.
//
// Tailscale shows a node's backend to extensions only. This one does nothing but remember
// it for as long as the node runs. A node without one is asked over LocalAPI, as is a
// daemon.

// backend is what is asked of a node's [tailscale.com/ipn/ipnlocal.LocalBackend].
type backend interface {
	WhoIs(proto string, ipp netip.AddrPort) (n tailcfg.NodeView, u tailcfg.UserProfile, ok bool)
	PeerCapsForIP(src, dst netip.Addr) tailcfg.PeerCapMap
}

// extension remembers the backend of one node.
type extension struct{ ipnext.SafeBackend }

const extensionName = "tailscale-impersonate"

func init() {
	ipnext.RegisterExtension(extensionName, func(_ logger.Logf, b ipnext.SafeBackend) (ipnext.Extension, error) {
		return extension{b}, nil
	})
}

// running are the nodes of this process that have started and not ended, and what asks
// their backends.
var running sync.Map // of *tsd.System to *questions

// Name implements [ipnext.Extension].
func (extension) Name() string { return extensionName }

// Init implements [ipnext.Extension].
func (e extension) Init(ipnext.Host) error {
	if b, ok := e.SafeBackend.(backend); ok {
		running.Store(e.Sys(), newQuestions(b))
	}
	return nil
}

// Shutdown implements [ipnext.Extension].
func (e extension) Shutdown() error {
	running.Delete(e.Sys())
	return nil
}

// questionsTo returns what asks the backend of node, nil if that cannot be asked.
func questionsTo(node *tsnet.Server) *questions {
	q, _ := running.Load(node.Sys()) // nil, which has none, if it has not been started
	questions, _ := q.(*questions)
	return questions
}

// maxQuestions is how many questions a backend is asked at a time. It answers within
// microseconds; if it is stuck, these are all that ever wait for it.
const maxQuestions = 64

// questions asks a backend.
type questions struct {
	backend
	slots chan struct{}
}

func newQuestions(b backend) *questions { return &questions{b, make(chan struct{}, maxQuestions)} }

// ask returns who the peer at remote is, with the capabilities that it is granted on
// local. Unlike the backend, it does not wait longer than ctx.
func (q *questions) ask(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
	select {
	case q.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	answer := make(chan *apitype.WhoIsResponse, 1)
	go func() {
		defer func() { <-q.slots }()
		answer <- whoIs(q.backend, remote, local)
	}()
	select {
	case who := <-answer:
		if who == nil {
			return nil, ErrPeerNotFound
		}
		return who, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// whoIs returns what b says about the peer at remote, nil if it knows none. It is what
// LocalAPI's handler of that name does.
func whoIs(b backend, remote, local netip.Addr) *apitype.WhoIsResponse {
	node, user, ok := b.WhoIs("", netip.AddrPortFrom(remote, 0))
	if !ok {
		return nil
	}
	who := &apitype.WhoIsResponse{Node: node.AsStruct(), UserProfile: &user}
	if node.Addresses().Len() > 0 {
		who.CapMap = b.PeerCapsForIP(node.Addresses().At(0).Addr(), local)
	}
	return who
}
