// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// Tailnet identity works like a cookie that cannot be withheld and never expires: what a
// web page makes a browser send arrives as the user of the device. Without a check, any
// page that the user of a granted device opens could create objects with a form post, or
// open a shell through a WebSocket, as the API server does not look at Origin. So could
// any page that a pod serves below .../proxy/, which has the origin of this site.
//
// These headers say who made a client send a request, and no web page can choose them:
//
//   - Sec-Fetch-Site: browsers since 2023 send it with all but WebSockets, to https and to
//     the device itself. They send none over plain HTTP.
//   - Origin: browsers send it with WebSockets and with all but GET and HEAD. Some programs
//     do as well.
//   - User-Agent: browsers' begin with Mozilla/. A page can choose it in some browsers, but
//     not that of a WebSocket, and not for another origin without asking first (CORS).
//   - Referer: a page can withhold it, but not name another origin.
//
// The first row that matches decides. "App" is what is below the proxy subresource of a
// service or pod, and the whoami page. "API" is all else, nodes/*/proxy included.
//
//	who sent the request                                         API  app
//	a page of an origin in allow_origins                         yes  yes
//	no Origin, no Sec-Fetch-Site, and:
//	    User-Agent Mozilla/: a browser over plain HTTP           yes  no   (1)
//	    otherwise a program                                      yes  yes
//	Origin, neither Sec-Fetch-Site nor Mozilla/: a program, and:
//	    Origin names this server or the device itself, and it
//	    is a WebSocket or comes over https                       yes  yes  (2)
//	    otherwise                                                no   no
//	Origin, and a WebSocket: a page in a browser, and:
//	    Origin is this site's, with scheme and port              no   yes
//	    otherwise                                                no   no
//	Sec-Fetch-Site: none, no Origin: its user, by hand           yes  yes
//	Sec-Fetch-Site: same-origin: a page of this site             no   yes  (3)
//	a link on another page opens a page of this site             no   yes  (4)
//	anything else: a page of another site                        no   no
//
// (1) A page that is loaded over plain HTTP could read the API: its GET requests carry
// nothing that tells them from a program's. So no page of an app is loaded that way.
// (2) A program can act as the user of its device without our help, so this row is about
// browsers that call themselves something else. They too say what page sends a request.
// (3) Not the script of a service worker. It would see what its user opens by hand.
// (4) The other page can neither read nor frame it, and an app has to expect it. Not if it
// only makes the browser fetch the page ahead.

// appCheck reports whether a request is for something that web pages of this site are
// made for.
type appCheck func(*http.Request) bool

// checkOrigin refuses requests that a web page sends which may not act as whoever opens
// it. It decides by the table above.
func (a *Authenticator) checkOrigin(r *http.Request, isApp appCheck) error {
	origin, hasOrigin := value(r, "Origin")
	site, hasSite := value(r, "Sec-Fetch-Site")
	isBrowser := hasSite || strings.HasPrefix(r.UserAgent(), "Mozilla/")
	switch {
	case !hasOrigin && !isBrowser: // a program, such as kubectl
		return nil
	case a.allows(pageOf(r)):
		return nil
	case !hasOrigin && !hasSite:
		if !a.allows(ownOrigin(r)) {
			return refuseUntold(r)
		}
		return nil
	case !isBrowser:
		if namesServer(origin, r) && (r.TLS != nil || upgrade.Requested(r.Header)) {
			return nil
		}
		return apistatus.Forbidden(apistatus.WebPage, "the program says that a web page of origin %q sent the request; let it send no Origin, or %q, or name the other in allow_origins", clip.String(origin), clip.String(ownOrigin(r)))
	case hasOrigin && upgrade.Requested(r.Header):
		if origin != ownOrigin(r) {
			return refusePage(r)
		}
	case site == "none" && !hasOrigin:
		return nil
	case site == "same-origin":
		if r.Header["Service-Worker"] != nil {
			return apistatus.Forbidden(apistatus.WebPage, "a web page installs a service worker, which would see all that its user opens on this site; if it may, name the origin %q in allow_origins", clip.String(pageOf(r)))
		}
	case !isNavigation(r):
		return refusePage(r)
	}
	if !isApp(r) {
		return refusePage(r)
	}
	return nil
}

// value returns the value of a header, and whether r has it. Browsers send one value.
// Several are joined, and match nothing.
func value(r *http.Request, name string) (string, bool) {
	values, ok := r.Header[name]
	return strings.Join(values, ", "), ok
}

// ownOrigin returns the origin of pages that a browser has loaded from where it sent r.
func ownOrigin(r *http.Request) string {
	if r.TLS == nil {
		return "http://" + r.Host
	}
	return "https://" + r.Host
}

// pageOf returns the origin of the page that sent r, empty if r does not tell. The page of
// a local program, such as kubectl proxy, which passes on what a browser sent, has an
// origin of its own although its Sec-Fetch-Site is same-origin.
func pageOf(r *http.Request) string {
	if origin, ok := value(r, "Origin"); ok {
		return origin
	}
	if site, _ := value(r, "Sec-Fetch-Site"); site != "same-origin" {
		return ""
	}
	if u, err := url.Parse(r.Referer()); err == nil && u.Host != "" {
		return u.Scheme + "://" + u.Host
	}
	return ownOrigin(r)
}

// allows reports whether pages of an origin may send requests as whoever opens them. A *
// in allow_origins stands for a part of a host or for a port, and so for no slash.
func (a *Authenticator) allows(origin string) bool {
	return strings.Count(origin, "/") == 2 && glob.Any(a.AllowOrigins, origin)
}

// namesServer reports whether an origin that a program has made up names the server that r
// is for, with any scheme or none, or the program's own device.
func namesServer(origin string, r *http.Request) bool {
	_, host, found := strings.Cut(origin, "://")
	if !found {
		host = origin
	}
	name := tailnet.Hostname(host)
	addr, err := netip.ParseAddr(name)
	return name != "" && name == tailnet.Hostname(r.Host) || name == "localhost" || err == nil && addr.IsLoopback()
}

// isNavigation reports whether a browser sent r to open a page in a window of its own. One
// that it fetches ahead, as another page tells it to, may never be opened.
func isNavigation(r *http.Request) bool {
	return r.Method == http.MethodGet && r.Header["Origin"] == nil && r.Header["Sec-Purpose"] == nil &&
		r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document"
}

// isPodApp reports whether r is for an application that a pod serves. If so, it requires
// that this is what is sent.
func isPodApp(r *http.Request) bool {
	// Something on the way to the API server might resolve dot segments, and leave the
	// application.
	return pin.On(r).IsApp() && !requestinfo.HasDotSegments(r.URL)
}

// isWhoami reports that r is for the whoami page.
func isWhoami(*http.Request) bool { return true }

// refusePage refuses r, which a web page sent.
func refusePage(r *http.Request) error {
	switch origin := pageOf(r); origin {
	case "":
		return apistatus.Forbidden(apistatus.WebPage, "a web page of another site sent the request (Sec-Fetch-Site: %s); to open the address yourself, enter it in the browser", clip.String(strings.Join(r.Header["Sec-Fetch-Site"], ", ")))
	case ownOrigin(r):
		return apistatus.Forbidden(apistatus.WebPage, "a web page of this site sent the request, and such pages may only use what is below .../proxy/ of services and pods, as pods serve them; if all of them may act as whoever opens them, name the origin %q in allow_origins", clip.String(origin))
	case "null":
		return apistatus.Forbidden(apistatus.WebPage, "a web page without an origin, such as a sandboxed frame or a file, sent the request; serve the page from an origin, and name that in allow_origins")
	default:
		return apistatus.Forbidden(apistatus.WebPage, "a web page of origin %q sent the request; if it may act as whoever opens it, name the origin in allow_origins", clip.String(origin))
	}
}

// refuseUntold refuses r, of which a browser does not say which page sends it, if it is
// for an application, and otherwise requires that it is not.
func refuseUntold(r *http.Request) error {
	holds := func(out *http.Request) error {
		if info := requestinfo.Parse(out); info.Ambiguous || info.Subresource == "proxy" {
			return apistatus.Forbidden(apistatus.WebPage, "the browser does not say which web page sends the request, so it gets no page of an application; use https and a current browser")
		}
		return nil
	}
	if !pin.Require(r, holds) {
		return pin.Refuse(r)
	}
	return holds(r)
}
