// SPDX-License-Identifier: Apache-2.0

// Package caddyfile holds the configuration of the tailscale_impersonate handler
// and its Caddyfile syntax.
//
// It is apart from the module, which embeds [Config], so that what can be
// configured can be read, and tested from Caddyfile to JSON, without the rest.
package caddyfile

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	pathpkg "path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/paths"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// What Config.ClientImpersonation can be.
const (
	Reject    = "reject"
	Strip     = "strip"
	Authorize = "authorize"
)

// Config is the configuration of the tailscale_impersonate handler. The zero
// value is a complete and safe one.
type Config struct {
	// The name of the tailnet capability under which the policy file's grants
	// name Kubernetes groups. Clusters that share a tailnet need one each,
	// since a grant is for all that look under its name.
	//
	// Default: `tailscale.com/cap/kubernetes`, and where a peer has no grant of
	// that name, its older form `https://tailscale.com/cap/kubernetes`. A name
	// given here replaces both.
	Capability string `json:"capability,omitempty"`

	// What to do with a request that asks to impersonate somebody by itself, as
	// `kubectl --as` does:
	//
	// - `reject` (the default) answers 403 and says why.
	// - `strip` ignores what the client asked for and sends the request on as
	//   the caller. The user of `kubectl --as` is then told about the wrong
	//   person's permissions.
	// - `authorize` sends the request on as whom the client asked for if the API
	//   server says that the caller itself may impersonate that, and with the
	//   caller in extra fields. It needs `transport kubernetes`, whose account asks
	//   (`create` on `subjectaccessreviews`).
	ClientImpersonation string `json:"client_impersonation,omitempty"`

	// Whether the API server is told more about the caller than user and groups,
	// for its audit log and its admission policies: as UID the ID of the tailnet
	// user, or of a tagged device, and as extra fields
	// `tailscale-impersonate.github.io/` followed by `node`, `node-id`, `address`,
	// `tags`, `groups-source` and `request-id`. The last is also the ID of the
	// request in the audit log (`Audit-ID`) and in Caddy's access log (`uuid`).
	//
	// The proxy's account needs the right to impersonate UIDs and these fields.
	//
	// Default: `false`.
	Audit bool `json:"audit,omitempty"`

	// The web origins (`https://dashboard.example.com`) whose pages may send
	// requests. Identity on a tailnet is ambient: a page that any user of a
	// device opens in a browser could act as that user, so a request that a
	// browser marks as another site's is refused unless its origin is named
	// here. kubectl and client-go send no origin.
	//
	// Default: none.
	AllowOrigins []string `json:"allow_origins,omitempty"`

	// Further names under which requests over plain HTTP may address the
	// server, besides the node's own name and addresses. Any other name in the
	// `Host` header is refused, since a web page can point a name of its own at
	// the node's address (DNS rebinding) and would then count as the same site.
	// Requests over TLS are not subject to this: the certificate proves the name.
	//
	// Default: none.
	AllowHosts []string `json:"allow_hosts,omitempty"`

	// How long the answer to who a caller is, is used for further requests on
	// the same connection. That is how long a grant can still count after it was
	// withdrawn, for requests that begin then. With 0 every request asks. A new
	// connection always does.
	//
	// Default: `1s`.
	CacheTTL *caddy.Duration `json:"cache_ttl,omitempty"`

	// The time between two checks whether the callers of requests that are still
	// open, such as a watch, a followed log or a shell, still have the groups
	// that they began them with. The connections of a caller that does not are
	// closed. All requests of one caller together cost one question to its
	// tailnet node.
	//
	// Default: `5s`.
	RecheckInterval *caddy.Duration `json:"recheck_interval,omitempty"`

	// How long such requests may go on when their caller cannot be checked, since
	// the last check that succeeded. With 0 the first that fails ends them.
	//
	// Default: `30s`.
	RecheckGrace *caddy.Duration `json:"recheck_grace,omitempty"`

	// A directory in which the sessions of kubectl exec and attach of all callers
	// are recorded, in asciicast v2, one file each. Placeholders such as
	// `{env.HOME}` are expanded when the config is loaded. It is created when it
	// does not exist. A session whose file cannot be written does not begin, and
	// ends when it cannot be written any more.
	//
	// The recorders that a caller's grants name are sent its sessions in any case.
	//
	// Default: none.
	Record string `json:"record,omitempty"`

	// The path under which callers are told who they are taken for: a page for
	// browsers, or JSON for whoever asks for that. Callers that are refused see
	// why, if they are known. `?kubeconfig` behind it answers with a kubeconfig
	// for this server. In a Caddyfile, the option without an argument stands for
	// `/whoami`.
	//
	// Default: none; the path is the API server's like all others.
	Whoami string `json:"whoami,omitempty"`

	// The Unix socket of the host's own Tailscale daemon, or `default` for where
	// that is by default. The daemon is then asked who callers are, for a Caddy
	// that listens on the tailnet address of its host rather than on a node of
	// its own. A connection counts if the address that the caller dialled is one
	// of the daemon's. In a Caddyfile, the option without an argument stands for
	// `default`.
	//
	// Default: none; callers are those of the nodes that the server listens on.
	Tailscaled string `json:"tailscaled,omitempty"`

	// Where all requests of all callers are recorded, besides the recorders that a
	// caller's grants name: `log` writes a line for each to the log
	// `http.handlers.tailscale_impersonate.events`, with what was asked for, by
	// whom, and the body.
	//
	// Default: nowhere.
	Events string `json:"events,omitempty"`

	// How many bytes of a body go into an event, to a recorder or to the log.
	// What is cut off is marked as such. At most 4 MiB; 0 leaves bodies out.
	//
	// Default: 65536.
	EventBodyLimit *int64 `json:"event_body_limit,omitempty"`

	// Whether the bodies of Secrets and of TokenReviews go into events as well.
	//
	// Default: `false`.
	EventSecretBodies bool `json:"event_secret_bodies,omitempty"`

	impersonate.Limits
}

// What the options stand for without an argument.
const (
	defaultWhoami     = "/whoami"
	defaultTailscaled = "default"
)

// LogEvents is what Config.Events can be, if anything.
const LogEvents = "log"

const (
	defaultEventBodyLimit = 64 << 10
	// maxEventBodyLimit is what the API server takes of a body, and some. As much
	// is held in memory for every request that is being recorded.
	maxEventBodyLimit = 4 << 20
)

// The defaults of durations.
const (
	defaultCacheTTL        = time.Second
	defaultRecheckInterval = 5 * time.Second
	defaultRecheckGrace    = 30 * time.Second
)

// minRecheckInterval keeps a slip of the unit from keeping the nodes busy.
const minRecheckInterval = 100 * time.Millisecond

// TTL returns for how long identities are kept.
func (c *Config) TTL() time.Duration { return orDefault(c.CacheTTL, defaultCacheTTL) }

// Interval returns the time between two checks of a caller.
func (c *Config) Interval() time.Duration {
	return orDefault(c.RecheckInterval, defaultRecheckInterval)
}

// Grace returns for how long a caller may go on that cannot be checked.
func (c *Config) Grace() time.Duration { return orDefault(c.RecheckGrace, defaultRecheckGrace) }

func orDefault(d *caddy.Duration, otherwise time.Duration) time.Duration {
	if d == nil {
		return otherwise
	}
	return time.Duration(*d)
}

// BodyLimit returns how many bytes of a body go into an event.
func (c *Config) BodyLimit() int64 {
	if c.EventBodyLimit == nil {
		return defaultEventBodyLimit
	}
	return *c.EventBodyLimit
}

// Validate returns an error that names the option and the reason if c cannot be
// used.
func (c *Config) Validate() error {
	if strings.ContainsAny(c.Capability, " \t\r\n") {
		return fmt.Errorf("capability %q: a capability name holds no blanks", c.Capability)
	}
	switch c.ClientImpersonation {
	case "", Reject, Strip, Authorize:
	default:
		return fmt.Errorf("client_impersonation %q: must be %s, %s or %s", c.ClientImpersonation, Reject, Strip, Authorize)
	}
	if c.TTL() < 0 {
		return fmt.Errorf("cache_ttl %v: must not be negative", c.TTL())
	}
	if c.Interval() < minRecheckInterval {
		return fmt.Errorf("recheck_interval %v: must be at least %v", c.Interval(), minRecheckInterval)
	}
	if c.Grace() < 0 {
		return fmt.Errorf("recheck_grace %v: must not be negative", c.Grace())
	}
	if err := checkWhoami(c.Whoami); err != nil {
		return fmt.Errorf("whoami %q: %w", c.Whoami, err)
	}
	if c.Tailscaled != "" && c.Tailscaled != defaultTailscaled && !filepath.IsAbs(c.Tailscaled) {
		return fmt.Errorf("tailscaled %q: must be the absolute path of a socket, or %s", c.Tailscaled, defaultTailscaled)
	}
	if c.Events != "" && c.Events != LogEvents {
		return fmt.Errorf("events %q: must be %s", c.Events, LogEvents)
	}
	if limit := c.BodyLimit(); limit < 0 || limit > maxEventBodyLimit {
		return fmt.Errorf("event_body_limit %d: must be between 0 and %d bytes", limit, maxEventBodyLimit)
	}
	if err := c.Limits.Validate(); err != nil {
		return err
	}
	for _, origin := range c.AllowOrigins {
		if err := checkOrigin(origin); err != nil {
			return fmt.Errorf("allow_origins %q: %w", origin, err)
		}
	}
	for _, host := range c.AllowHosts {
		if err := checkHost(host); err != nil {
			return fmt.Errorf("allow_hosts %q: %w", host, err)
		}
	}
	return nil
}

// DaemonSocket returns the path of the Tailscale daemon's socket.
func (c *Config) DaemonSocket() string {
	if c.Tailscaled == defaultTailscaled {
		return paths.DefaultTailscaledSocket()
	}
	return c.Tailscaled
}

// Capabilities returns the names under which to look for grants, in order.
func (c *Config) Capabilities() []tailcfg.PeerCapability {
	if c.Capability == "" {
		return impersonate.Capabilities
	}
	return []tailcfg.PeerCapability{tailcfg.PeerCapability(c.Capability)}
}

// served are the first segments of the paths that API servers answer.
var served = []string{"api", "apis", "debug", "flagz", "healthz", "livez", "logs", "metrics", "openapi", "openid", "readyz", "statusz", "swagger.json", "version", ".well-known"}

// checkWhoami returns an error unless path is empty or a path that is nobody
// else's.
func checkWhoami(path string) error {
	if path == "" {
		return nil
	}
	if !strings.HasPrefix(path, "/") || path == "/" || pathpkg.Clean(path) != path {
		return errors.New("must be a path such as /whoami")
	}
	if strings.Trim(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/") != "" {
		return errors.New("must hold letters, digits, hyphens, dots and slashes only")
	}
	first, _, _ := strings.Cut(path[1:], "/")
	if slices.Contains(served, first) {
		return fmt.Errorf("the API server answers requests for /%s", first)
	}
	return nil
}

// checkOrigin returns an error unless origin is written as browsers send it, as
// anything else would never match.
func checkOrigin(origin string) error {
	u, err := url.Parse(origin)
	if err != nil {
		return err
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || origin != u.Scheme+"://"+u.Host {
		return errors.New("must be a scheme and a host, with a port if it is not the scheme's own, such as https://dashboard.example.com")
	}
	if u.Host != strings.ToLower(u.Host) {
		return errors.New("must be in lower case, as browsers send it")
	}
	if strings.HasSuffix(u.Host, ":") {
		return errors.New("the port is missing")
	}
	if err := checkHost(u.Hostname()); err != nil {
		return err
	}
	if (u.Scheme == "https" && u.Port() == "443") || (u.Scheme == "http" && u.Port() == "80") {
		return errors.New("must leave out the scheme's own port, as browsers do")
	}
	return nil
}

// checkHost returns an error unless host is a name or address as
// [tailnet.Hostname] returns it from a request.
func checkHost(host string) error {
	if _, err := netip.ParseAddr(host); err == nil {
		return nil
	}
	if host == "" || tailnet.Hostname(host) != host {
		return errors.New("must be a host name in lower case, or an address, without a port and without a final dot")
	}
	if strings.TrimLeft(host, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		return errors.New("must name one host, in letters, digits, hyphens and dots (punycode for others), without wildcards")
	}
	return nil
}
