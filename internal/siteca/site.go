// SPDX-License-Identifier: Apache-2.0

package siteca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddypki"
	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/once"
)

// handshakeTimeout is how long a server may take to choose a certificate. It takes longer
// than a millisecond only where it asks another program.
const handshakeTimeout = 2 * time.Second

// An answer is good for a minute. Certificates are replaced by ones of the same authority,
// and a handshake is work that any caller could ask for.
const (
	answerTTL  = time.Minute
	maxAnswers = 1024
)

// Site finds the certificate authority of what a server presents.
type Site struct {
	// config is the server's TLS configuration.
	config func() *tls.Config
	// own returns the roots of Caddy's own authorities.
	own func() []*x509.Certificate

	answers *lru.Cache[question, answer]
	asking  once.Group[question, *x509.Certificate]
}

// question is what a server's choice of a certificate may depend on.
type question struct {
	serverName    string
	remote, local string // addresses
}

type answer struct {
	ca    *x509.Certificate
	asked time.Time
}

// Of returns the site of server. It must be called while the config is provisioned, and
// looks at nothing before the config runs.
func Of(ctx caddy.Context, server *caddyhttp.Server) *Site {
	answers, err := lru.New[question, answer](maxAnswers)
	if err != nil {
		panic(err) // the size is positive
	}
	return &Site{
		answers: answers,
		config:  sync.OnceValue(func() *tls.Config { return server.TLSConnPolicies.TLSConfig(ctx) }),
		own: func() (roots []*x509.Certificate) {
			app, err := ctx.AppIfConfigured("pki")
			if err != nil {
				return nil // no site has a certificate of Caddy's own
			}
			for _, ca := range app.(*caddypki.PKI).CAs {
				roots = append(roots, ca.RootCertificate())
			}
			return roots
		},
	}
}

// Client is a client of a site.
type Client struct {
	// ServerName is the name that it asks the site for.
	ServerName string
	// Local and Remote are the addresses of its connection, as the server sees them. They
	// may be nil.
	Local, Remote net.Addr
}

// CA returns the authority of the certificate that the sender of r was shown. It is nil if
// that is a public one, or if the root is neither Caddy's own nor in the chain.
func (s *Site) CA(r *http.Request) (*x509.Certificate, error) {
	if s == nil || r.TLS == nil {
		return nil, nil
	}
	client := Client{ServerName: r.TLS.ServerName}
	client.Local, _ = r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if addr, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		client.Remote = net.TCPAddrFromAddrPort(addr)
	}
	return s.CAFor(r.Context(), client)
}

// CAFor returns the authority of the certificate that client would be shown, as [Site.CA]
// does.
func (s *Site) CAFor(ctx context.Context, client Client) (*x509.Certificate, error) {
	q := question{client.ServerName, host(client.Remote), host(client.Local)}
	if known, ok := s.answers.Get(q); ok && time.Since(known.asked) < answerTTL {
		return known.ca, nil
	}
	return s.asking.Ask(ctx, q, time.Now().Add(-answerTTL), func(ctx context.Context, asked time.Time) (*x509.Certificate, error) {
		ca, err := s.find(ctx, client)
		if err == nil {
			s.answers.Add(q, answer{ca, asked})
		}
		return ca, err
	})
}

// host returns an address without its port.
func host(address net.Addr) string {
	if address == nil {
		return ""
	}
	if h, _, err := net.SplitHostPort(address.String()); err == nil {
		return h
	}
	return address.String()
}

// find is CAFor without what is known.
func (s *Site) find(ctx context.Context, client Client) (*x509.Certificate, error) {
	chain, err := s.chain(ctx, client)
	if err != nil {
		return nil, fmt.Errorf("a handshake with this server: %w", err)
	}
	// First of all Caddy's own: Caddy adds those to what its host trusts.
	if own := Root(chain, s.own()); own != nil {
		return own, nil
	}
	if Public(chain) {
		return nil, nil
	}
	return Root(chain, SelfSigned(chain)), nil
}

var errSeen = errors.New("the certificate has been seen")

// chain returns what the server presents to a client. Nothing but a handshake tells what a
// server presents, which depends on policies for connections, on managers of certificates,
// and on what the client offers. This one takes place in memory.
func (s *Site) chain(ctx context.Context, to Client) (chain []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	near, far := net.Pipe()
	defer near.Close()
	go func() {
		defer far.Close()
		_ = tls.Server(endpoints{far, to}, s.config()).HandshakeContext(ctx) // the client says why it failed
	}()
	client := tls.Client(near, &tls.Config{
		ServerName:         to.ServerName,
		InsecureSkipVerify: true, //nolint:gosec // the certificate is looked at, and nothing is sent
		VerifyConnection: func(state tls.ConnectionState) error {
			chain = state.PeerCertificates
			_ = near.Close() // or each end may wait for the other to read
			return errSeen
		},
	})
	if err := client.HandshakeContext(ctx); !errors.Is(err, errSeen) {
		return nil, err
	}
	return chain, nil
}

// endpoints is a connection with the addresses of a client's.
type endpoints struct {
	net.Conn
	client Client
}

func (e endpoints) LocalAddr() net.Addr {
	if e.client.Local != nil {
		return e.client.Local
	}
	return e.Conn.LocalAddr()
}

func (e endpoints) RemoteAddr() net.Addr {
	if e.client.Remote != nil {
		return e.client.Remote
	}
	return e.Conn.RemoteAddr()
}
