// SPDX-License-Identifier: Apache-2.0

// Package sites lists for a visitor of one site which other sites of the same Caddy it may
// use, for a kubeconfig with all of them.
//
// A visitor learns of a site only what the site's own whoami page would say, and only if
// the site's node, asked about the visitor's device, and its handler give the visitor an
// identity. A site takes part if it has the option whoami.
package sites

import (
	"cmp"
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

const (
	// listTimeout is how long a list may take. A node that hangs has to be waited for, and
	// so does a handshake for which a certificate is obtained.
	listTimeout = 3 * time.Second
	// asking is how many sites are asked at a time, for one list.
	asking = 8
	// quietSeconds is how long a site that is left out of lists is not logged again.
	quietSeconds = 60
	// maxDoors is how many names and ports of one site are tried.
	maxDoors = 16
)

// Site is a site that takes part.
type Site struct {
	// Handler is the site's handler, Server the server that it belongs to.
	Handler caddyhttp.MiddlewareHandler
	Server  *caddyhttp.Server
	// Whoami is the path of its whoami page.
	Whoami string
	Auth   *authn.Authenticator
	CA     *siteca.Site
	Logger *zap.Logger
}

// Directory is the sites of one config that take part.
type Directory struct {
	// HTTPPort returns the port on which no server of the config speaks TLS.
	HTTPPort func() int

	sites  []Site
	lookUp sync.Once
	places []*place
}

// Add adds a site, while its config is provisioned.
func (d *Directory) Add(site Site) { d.sites = append(d.sites, site) }

// place is where a site is to be found.
type place struct {
	Site
	doors []door
	// quiet is until when nothing is logged, in seconds since 1970: visitors can ask often.
	quiet atomic.Int64
}

// door is a URL of a site.
type door struct {
	authn.Door
	// prefix is the path below which the site is, as it is written in a URL.
	prefix string
}

// For returns the sites that a visitor may use, except for the one of the handler that it
// visits at the URL here, by their URLs. Of sites with the same URL, which are replicas of
// one, it returns the first in the config that lets the visitor in. The list is incomplete
// if it is not known of some site whether the visitor may use it. d may be nil.
func (d *Directory) For(ctx context.Context, visitor authn.Visitor, visited caddyhttp.MiddlewareHandler, here string) (list []whoami.Site, incomplete bool) {
	if d == nil {
		return nil, false
	}
	d.lookUp.Do(func() { d.places = find(d.sites, d.HTTPPort()) })
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	found := make([]*whoami.Site, len(d.places))
	var unknown atomic.Bool
	var all errgroup.Group
	all.SetLimit(asking)
	for i, p := range d.places {
		if p.Handler == visited {
			continue
		}
		all.Go(func() error {
			site, err := p.visit(ctx, visitor)
			if err != nil {
				p.warn(err)
				unknown.Store(true)
				return nil
			}
			found[i] = site
			return nil
		})
	}
	_ = all.Wait() // there are no errors
	known := map[string]bool{here: true}
	for _, site := range found {
		if site != nil && !known[site.Server] {
			known[site.Server] = true
			list = append(list, *site)
		}
	}
	slices.SortFunc(list, func(a, b whoami.Site) int { return cmp.Compare(a.Server, b.Server) })
	return list, unknown.Load()
}

// visit returns what the list has about p, nil if the visitor may not use it.
func (p *place) visit(ctx context.Context, visitor authn.Visitor) (*whoami.Site, error) {
	var unknown error
	for _, door := range p.doors {
		welcome, err := p.Auth.Visit(ctx, visitor, door.Door)
		if err != nil {
			unknown = err
			continue
		}
		if welcome == nil {
			continue
		}
		var ca *x509.Certificate
		if door.TLS {
			if ca, err = p.authority(ctx, visitor, welcome); err != nil {
				return nil, err
			}
		}
		site := whoami.NewSite(url(door, welcome.Host), ca, welcome.Facts)
		return &site, nil
	}
	return nil, unknown
}

// warn logs that a list lacks p.
func (p *place) warn(err error) {
	now, quiet := time.Now().Unix(), p.quiet.Load()
	if now < quiet || !p.quiet.CompareAndSwap(quiet, now+quietSeconds) {
		return
	}
	p.Logger.Warn("cannot find out whether a visitor of another site may use this one, and its list lacks this site", zap.Strings("listen", p.Server.Listen), zap.Error(err))
}

// authority returns the authority of the certificate that the visitor is shown.
func (p *place) authority(ctx context.Context, visitor authn.Visitor, welcome *authn.Welcome) (*x509.Certificate, error) {
	client := siteca.Client{
		ServerName: welcome.Host,
		Local:      net.TCPAddrFromAddrPort(welcome.Local),
		Remote:     net.TCPAddrFromAddrPort(netip.AddrPortFrom(visitor.Address, 0)),
	}
	if _, err := netip.ParseAddr(client.ServerName); err == nil {
		client.ServerName = "" // clients send none then
	}
	return p.CA.CAFor(ctx, client)
}

// url returns the URL of a site at host.
func url(d door, host string) string {
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		host = "[" + host + "]"
	}
	scheme, usual := "http", uint16(80)
	if d.TLS {
		scheme, usual = "https", 443
	}
	if d.Port != usual {
		host += ":" + strconv.Itoa(int(d.Port))
	}
	return scheme + "://" + host + strings.TrimRight(d.prefix, "/")
}
