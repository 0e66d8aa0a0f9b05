// SPDX-License-Identifier: Apache-2.0

// Package caddyfile holds the configuration of the tailscale_impersonate handler, its
// Caddyfile syntax, the directive tailscale_kubernetes, and the checks of the routes
// around the handler.
//
// The handler's module embeds [Config].
package caddyfile

import (
	"encoding/json"
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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// The values of [Config.ClientImpersonation].
const (
	Reject    = "reject"
	Strip     = "strip"
	Authorize = "authorize"
)

// Config is the configuration of the tailscale_impersonate handler. The zero value is
// complete and safe.
type Config struct {
	// The name of the tailnet capability under which grants in the policy file name
	// Kubernetes groups. Clusters that share a tailnet need a capability each, as a
	// grant applies to all clusters that use its name.
	//
	// Default: `tailscale.com/cap/kubernetes`, or for a peer without such a grant its
	// older form `https://tailscale.com/cap/kubernetes`. A name given here replaces
	// both.
	Capability string `json:"capability,omitempty"`

	// What to do with requests that ask to act as another user, as `kubectl --as`
	// does. A request that asks for groups of its own caller is not one of them: it is
	// sent with those groups and no others, except with `strip`.
	//
	// - `reject` answers 403 with the reason.
	// - `strip` removes the headers and sends the request as the caller. The answer
	//   then shows the caller's permissions and not the other user's.
	// - `authorize` sends the request as the other user, with the caller in extra
	//   fields, if the API server says that the caller may impersonate that user.
	//   It needs `transport kubernetes`, whose account asks the API server and needs
	//   the right to `create` `subjectaccessreviews`.
	//
	// Default: `reject`.
	ClientImpersonation string `json:"client_impersonation,omitempty"`

	// Describe the caller's device to the API server, for audit logs and admission
	// policies. The UID is the ID of the tailnet user or of the tagged device. The
	// extra fields start with `tailscale-impersonate.github.io/` and are `node`,
	// `node-id`, `address`, `tags`, `groups-source`, `chosen-groups`,
	// `held-back-groups` and `request-id`. The last one is also the ID of the request
	// in the audit log (`Audit-ID`) and in Caddy's access log (`uuid`).
	//
	// The proxy's account needs the right to impersonate UIDs and these fields.
	//
	// Default: `false`.
	Audit bool `json:"audit,omitempty"`

	// Web origins, such as `https://dashboard.example.com`, whose pages may send
	// requests as whoever opens them. A browser on a device of the tailnet needs no
	// credentials, so any web page in it could act as the device's user. Requests that a
	// browser sends for other pages are refused. Pages of this site may use only what is
	// below `.../proxy/` of services and pods, as pods serve them, and the `whoami` page,
	// unless the site's own origin is listed here.
	//
	// `https://*.example.com` stands for every name below `example.com`, and a port of
	// `*` for every port that is not the scheme's own. `file://` stands for the windows
	// of a desktop application, and in some browsers also for every file that their user
	// opens.
	//
	// Default: none.
	AllowOrigins []string `json:"allow_origins,omitempty"`

	// More host names for requests over plain HTTP, besides the names and addresses
	// of the node. Other names in the `Host` header are refused, as a web page can
	// point its own name at the node's address (DNS rebinding) and would then count
	// as the same site. Requests over TLS may use any name, as the certificate proves
	// it.
	//
	// Default: none.
	AllowHosts []string `json:"allow_hosts,omitempty"`

	// How long what was found out about a caller is cached: its identity, or why it is
	// refused, and whether it may act as another user. `0` disables caching. A new
	// connection always looks up its caller. After a grant is withdrawn, new requests on
	// an open connection can use it for this long; after one is given, they can be
	// refused for this long.
	//
	// Default: `1s`.
	CacheTTL *caddy.Duration `json:"cache_ttl,omitempty"`

	// The interval at which the callers of open requests, such as watches, followed
	// logs and shells, are checked. If a caller has lost a group that it had when the
	// request began, its connections are closed. One lookup per interval checks all
	// requests of a caller.
	//
	// Default: `5s`.
	RecheckInterval *caddy.Duration `json:"recheck_interval,omitempty"`

	// How long open requests may continue after the last successful check if their
	// caller cannot be checked. With `0`, the first failed check ends them.
	//
	// Default: `30s`.
	RecheckGrace *caddy.Duration `json:"recheck_grace,omitempty"`

	// How long clients can send requests on one connection, up to a tenth less at random.
	// After that, the next answer makes the client open another one: the tailnet lets
	// only those in that may connect now. What is open goes on. `0` sets no limit.
	//
	// Default: `15m`.
	MaxConnectionAge *caddy.Duration `json:"max_connection_age,omitempty"`

	// A directory for recordings of the `kubectl exec` and `attach` sessions of all
	// callers, one asciicast v2 file per session. It is created if it does not exist.
	// Placeholders such as `{env.HOME}` are expanded when the config is loaded. A
	// session does not start if its file cannot be written, and ends if writing fails
	// later.
	//
	// Sessions are also sent to the recorders that a caller's grants name.
	//
	// Default: none.
	Record string `json:"record,omitempty"`

	// The maximum number of bytes that all recordings in the directory take, to the
	// next 4 KiB for each file. At the limit, sessions that have to be recorded are
	// refused, or end. Others go on without a recording, which the log and a metric say.
	// Handlers with the same directory share its size. `0` means no limit.
	//
	// Default: `1073741824`, 1 GiB.
	RecordMaxSize *int64 `json:"record_max_size,omitempty"`

	// How long recordings are kept in the directory, at least an hour. A recording that
	// has not been written to for longer is deleted. Handlers with the same directory
	// delete each other's recordings.
	//
	// Default: forever.
	RecordRetention *caddy.Duration `json:"record_retention,omitempty"`

	// All sessions have to be recorded in the directory: what leads past the recording
	// is refused, as for callers whose grants enforce recording, and so are sessions at
	// the limit of `record_max_size`.
	//
	// Default: `false`.
	RecordRequired bool `json:"record_required,omitempty"`

	// Where complete recordings go from the directory of `record`: a module of the
	// namespace `tailscale_impersonate.recordings`, such as `s3`, which is a Go module of its
	// own below this one, or `directory`. Its name is in `storage`. What the storage
	// does not take is sent again, also after a restart. Handlers with the same directory
	// need the same storage.
	//
	// Default: none; recordings stay in the directory.
	RecordToRaw json.RawMessage `json:"record_to,omitempty" caddy:"namespace=tailscale_impersonate.recordings inline_key=storage"`

	// Remove a recording from the directory once the storage of `record_to` has it.
	//
	// Default: `false`.
	RecordRemoveStored bool `json:"record_remove_stored,omitempty"`

	// Refuse new sessions that have to be recorded while a recording has waited for the
	// storage of `record_to` for longer, at least a minute. Then no more than what is
	// recorded in that time, and the sessions that are open, is on the proxy's disk
	// alone.
	//
	// Default: no limit.
	RecordStoreWithin *caddy.Duration `json:"record_store_within,omitempty"`

	// Record what is typed, besides what is printed. The only value is `all`: the proxy
	// cannot see what a terminal does not show, so the recordings contain passwords and
	// keys that are typed or pasted. Of a session without a terminal, the first MiB of
	// its input is recorded.
	//
	// Default: none.
	RecordInput string `json:"record_input,omitempty"`

	// The sessions that may take place where recording is enforced, by a grant or by
	// `record_required`: `exec`, `attach` and `port-forward`. Others are refused. A
	// port-forward is logged, not recorded.
	//
	// Default: all three.
	EnforcedSessions []string `json:"enforced_sessions,omitempty"`

	// A path below which readers find and watch the recordings in the directory of
	// `record`. In a Caddyfile, the option without an argument means `/recordings`.
	//
	// Default: none; the API server answers all paths.
	Recordings string `json:"recordings,omitempty"`

	// Patterns of the groups whose members may read recordings, as they are after
	// `group_prefix`. `*` stands for any characters. Needed with `recordings`: there is no
	// default.
	RecordingsReaders []string `json:"recordings_readers,omitempty"`

	// A path that shows callers who they are to the cluster, and why. Returns JSON if
	// the request accepts `application/json` and not `text/html`, or else a page. A
	// known caller that is refused sees the reason. It lists the other sites with this
	// option that the caller may use. With the query `?kubeconfig`, it returns a kubeconfig
	// for all of them. In a Caddyfile, the option without an
	// argument means `/whoami`.
	//
	// Default: none; the API server answers all paths.
	Whoami string `json:"whoami,omitempty"`

	// The group for which kubeconfigs have a context for reading only, without
	// `group_prefix`. Callers who are granted the group get the context, with which
	// requests use that group and no other. It is the current context. What the group
	// may do is up to RBAC.
	//
	// Default: none.
	ReadOnlyGroup string `json:"read_only_group,omitempty"`

	// The Unix socket of the host's Tailscale daemon, or `default` for its usual path.
	// Use it if Caddy listens on the tailnet address of its host and not on a node of
	// its own: callers are then looked up in the daemon. The address that a caller
	// dials has to belong to the daemon. In a Caddyfile, the option without an
	// argument means `default`.
	//
	// Default: none; callers are looked up in the nodes that the server listens on.
	Tailscaled string `json:"tailscaled,omitempty"`

	// Where to record the requests of all callers, besides the recorders that their
	// grants name. `log` writes an entry for each request to the log
	// `http.handlers.tailscale_impersonate.events`, with the caller, the request and
	// its body.
	//
	// Default: none.
	Events string `json:"events,omitempty"`

	// The maximum number of bytes of a body in an event. Longer bodies are marked as
	// truncated. At most 4 MiB; `0` omits bodies.
	//
	// Default: `65536`.
	EventBodyLimit *int64 `json:"event_body_limit,omitempty"`

	// Refuse a request whose body is longer than `event_body_limit` if its caller's
	// grants enforce recording. Otherwise the end of the body is not on record. In a
	// Caddyfile, it is the second argument of `event_body_limit`: `64KiB refuse`.
	//
	// Default: `false`.
	EventBodyRefuse bool `json:"event_body_refuse,omitempty"`

	// Include the bodies of Secrets and TokenReviews in events.
	//
	// Default: `false`.
	EventSecretBodies bool `json:"event_secret_bodies,omitempty"`

	impersonate.Limits
}

// What the options mean without an argument.
const (
	defaultWhoami     = "/whoami"
	defaultRecordings = "/recordings"
	defaultTailscaled = "default"
)

// LogEvents is the only value of [Config.Events].
const LogEvents = "log"

// AllInput is the only value of [Config.RecordInput].
const AllInput = "all"

const (
	// defaultRecordMaxSize leaves room on the volumes of most installations: a volume
	// that is full of recordings may keep the node or the certificates from being saved.
	defaultRecordMaxSize = 1 << 30
	// minRecordRetention protects recordings from a duration in the wrong unit, and
	// those that another process writes: it marks them every ten minutes.
	minRecordRetention = time.Hour
	// minStoreWithin is longer than a storage takes for a recording, and than a short
	// outage.
	minStoreWithin = time.Minute
)

const (
	defaultEventBodyLimit = 64 << 10
	// maxEventBodyLimit is larger than any body that the API server accepts. Recording
	// holds up to this much in memory per request.
	maxEventBodyLimit = 4 << 20
)

// The default durations.
const (
	defaultCacheTTL         = time.Second
	defaultRecheckInterval  = 5 * time.Second
	defaultRecheckGrace     = 30 * time.Second
	defaultMaxConnectionAge = 15 * time.Minute
)

// minRecheckInterval protects the nodes from an interval in the wrong unit.
const minRecheckInterval = 100 * time.Millisecond

// TTL returns how long identities are cached.
func (c *Config) TTL() time.Duration { return orDefault(c.CacheTTL, defaultCacheTTL) }

// Interval returns the interval between two checks of a caller.
func (c *Config) Interval() time.Duration {
	return orDefault(c.RecheckInterval, defaultRecheckInterval)
}

// Grace returns how long requests of a caller that cannot be checked may continue.
func (c *Config) Grace() time.Duration { return orDefault(c.RecheckGrace, defaultRecheckGrace) }

// ConnectionAge returns how long requests may come on one connection, 0 for no limit.
func (c *Config) ConnectionAge() time.Duration {
	return orDefault(c.MaxConnectionAge, defaultMaxConnectionAge)
}

func orDefault(d *caddy.Duration, otherwise time.Duration) time.Duration {
	if d == nil {
		return otherwise
	}
	return time.Duration(*d)
}

// BodyLimit returns the maximum number of bytes of a body in an event.
func (c *Config) BodyLimit() int64 {
	if c.EventBodyLimit == nil {
		return defaultEventBodyLimit
	}
	return *c.EventBodyLimit
}

// MaxRecordSize returns how many bytes all recordings may take, 0 for no limit.
func (c *Config) MaxRecordSize() int64 {
	if c.RecordMaxSize == nil {
		return defaultRecordMaxSize
	}
	return *c.RecordMaxSize
}

// Retention returns how long recordings are kept, 0 for ever.
func (c *Config) Retention() time.Duration { return orDefault(c.RecordRetention, 0) }

// StoreWithin returns how long recordings may wait for the storage, 0 for no limit.
func (c *Config) StoreWithin() time.Duration { return orDefault(c.RecordStoreWithin, 0) }

// checkRecord returns an error if the options about recordings are invalid.
func (c *Config) checkRecord() error {
	if c.RecordInput != "" && c.RecordInput != AllInput {
		return fmt.Errorf("record_input %q: must be %s", c.RecordInput, AllInput)
	}
	for _, session := range c.EnforcedSessions {
		if !slices.Contains(sessionrecording.Kinds, session) {
			return fmt.Errorf("enforced_sessions %q: must be one of %s", session, strings.Join(sessionrecording.Kinds, ", "))
		}
	}
	switch {
	case c.MaxRecordSize() < 0:
		return fmt.Errorf("record_max_size %d: must not be negative", c.MaxRecordSize())
	case c.RecordRetention != nil && c.Retention() < minRecordRetention:
		return fmt.Errorf("record_retention %v: must be at least %v", c.Retention(), minRecordRetention)
	case c.RecordToRaw == nil && c.RecordRemoveStored:
		return errors.New("record_remove_stored: needs record_to, which stores the recordings")
	case c.RecordToRaw == nil && c.RecordStoreWithin != nil:
		return errors.New("record_store_within: needs record_to, which stores the recordings")
	case c.RecordStoreWithin != nil && c.StoreWithin() < minStoreWithin:
		return fmt.Errorf("record_store_within %v: must be at least %v", c.StoreWithin(), minStoreWithin)
	case c.Record != "":
		return nil
	case c.RecordToRaw != nil:
		return errors.New("record_to: needs record, the directory that recordings are written to before they are stored")
	case c.RecordMaxSize != nil:
		return errors.New("record_max_size: needs record, the directory that it limits")
	case c.RecordRetention != nil:
		return errors.New("record_retention: needs record, the directory that it applies to")
	case c.RecordRequired:
		return errors.New("record_required: needs record, the directory to record to")
	}
	return nil
}

// Validate returns an error that names the option and the reason if c is invalid.
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
	if c.ConnectionAge() < 0 {
		return fmt.Errorf("max_connection_age %v: must not be negative", c.ConnectionAge())
	}
	if err := checkPath(c.Whoami, defaultWhoami); err != nil {
		return fmt.Errorf("whoami %q: %w", c.Whoami, err)
	}
	if err := c.checkRecordings(); err != nil {
		return err
	}
	if c.Tailscaled != "" && c.Tailscaled != defaultTailscaled && !filepath.IsAbs(c.Tailscaled) {
		return fmt.Errorf("tailscaled %q: must be the absolute path of a socket, or %s", c.Tailscaled, defaultTailscaled)
	}
	if strings.Contains(c.ReadOnlyGroup, "*") || !impersonate.PrintableASCII(c.ReadOnlyGroup) {
		return fmt.Errorf("read_only_group %q: must be the name of one group", c.ReadOnlyGroup)
	}
	if c.Events != "" && c.Events != LogEvents {
		return fmt.Errorf("events %q: must be %s", c.Events, LogEvents)
	}
	if err := c.checkRecord(); err != nil {
		return err
	}
	if limit := c.BodyLimit(); limit < 0 || limit > maxEventBodyLimit {
		return fmt.Errorf("event_body_limit %d: must be between 0 and %d bytes", limit, maxEventBodyLimit)
	}
	if c.EventBodyRefuse && c.BodyLimit() == 0 {
		return errors.New("event_body_limit 0: omits all bodies, so none can be refused for its length")
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

// Capabilities returns the names of the capability. Only the first that a peer has counts.
func (c *Config) Capabilities() []tailcfg.PeerCapability {
	if c.Capability == "" {
		return impersonate.Capabilities
	}
	return []tailcfg.PeerCapability{tailcfg.PeerCapability(c.Capability)}
}

// served are the first segments of the API server's paths.
var served = []string{"api", "apis", "debug", "flagz", "healthz", "livez", "logs", "metrics", "openapi", "openid", "readyz", "statusz", "swagger.json", "version", ".well-known"}

// checkRecordings returns an error if the options about reading recordings are invalid.
func (c *Config) checkRecordings() error {
	if err := checkPath(c.Recordings, defaultRecordings); err != nil {
		return fmt.Errorf("recordings %q: %w", c.Recordings, err)
	}
	for _, pattern := range c.RecordingsReaders {
		if pattern == "" || !impersonate.PrintableASCII(pattern) {
			return fmt.Errorf("recordings_readers %q: must be the name of a group, or a pattern of names", pattern)
		}
	}
	switch {
	case c.Recordings == "" && len(c.RecordingsReaders) > 0:
		return errors.New("recordings_readers: needs recordings, the page that they read")
	case c.Recordings == "":
		return nil
	case len(c.RecordingsReaders) == 0:
		return errors.New("recordings: needs recordings_readers, the groups whose members may read what others have seen and done")
	case c.Record == "":
		return errors.New("recordings: needs record, the directory of the recordings")
	case c.Recordings == c.Whoami:
		return fmt.Errorf("recordings %q: is the path of whoami", c.Recordings)
	}
	return nil
}

// checkPath returns an error unless path is empty or a clean path, such as example, that
// the API server does not use.
func checkPath(path, example string) error {
	if path == "" {
		return nil
	}
	if !strings.HasPrefix(path, "/") || path == "/" || pathpkg.Clean(path) != path {
		return fmt.Errorf("must be a path such as %s", example)
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

// checkOrigin returns an error unless origin is spelled as browsers send it, except for
// wildcards. Other spellings would never match.
func checkOrigin(origin string) error {
	if origin == "file://" {
		return nil
	}
	// A wildcard stands for a name or a number.
	origin = strings.Replace(origin, "://*.", "://any.", 1)
	if rest, found := strings.CutSuffix(origin, ":*"); found {
		origin = rest + ":1"
	}
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

// checkHost returns an error unless host is spelled as [tailnet.Hostname] returns it for a
// request.
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
