// SPDX-License-Identifier: Apache-2.0

package apistatus

import (
	"cmp"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
)

const (
	// maxLines is how many refusals of one caller are logged in each period.
	maxLines = 20
	period   = time.Minute
	// maxCallers is how many callers are counted in each period. All further ones share
	// a count. Forgetting a caller for another would let whoever has many addresses fill
	// the log.
	maxCallers = 1024
)

// Log logs refusals, each caller's up to a limit. A caller needs no rights to be refused,
// as often as it likes.
type Log struct {
	logger *zap.Logger

	mu sync.Mutex
	// refused is how often each caller was refused in this period, nil before the
	// period's first refusal. The zero Addr is for all callers beyond maxCallers.
	refused map[netip.Addr]int
	end     *time.Timer
}

// NewLog returns a Log that writes to logger.
func NewLog(logger *zap.Logger) *Log { return &Log{logger: logger} }

// Refused logs that r is refused with err. who identifies the caller; without it, Refused
// uses what [About] added to err. Call it wherever a refusal is written.
func (l *Log) Refused(r *http.Request, err error, who ...zap.Field) {
	if !l.Allows(r) {
		return
	}
	message, code := err.Error(), int32(http.StatusInternalServerError)
	if status, ok := From(err); ok {
		message, code = status.Message, status.Code
	}
	fields := []zap.Field{
		zap.String("reason", message),
		zap.String("code", string(ReasonOf(err))),
		zap.Int32("status", code),
		zap.String("remote_addr", r.RemoteAddr),
		zap.String("method", clip.String(r.Method)),
		zap.String("host", clip.String(r.Host)),
		zap.String("uri", clip.String(cmp.Or(r.RequestURI, r.URL.RequestURI()))), // outgoing requests have only the latter
		zap.String("request_id", RequestID(r)),
	}
	if cause := Cause(err); cause != nil {
		fields = append(fields, zap.Error(cause))
	}
	if node, user := Of(err); len(who) == 0 && node+user != "" {
		who = []zap.Field{zap.String("node", node), zap.String("user", user)}
	}
	l.logger.Warn("request refused", append(fields, who...)...)
}

// Allows counts a refusal of the caller of r, and reports whether it may be logged.
func (l *Log) Allows(r *http.Request) bool {
	remote, _ := netip.ParseAddrPort(r.RemoteAddr) // the zero Addr if there is none
	caller := remote.Addr().Unmap()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refused == nil {
		l.refused = make(map[netip.Addr]int)
		l.end = time.AfterFunc(period, l.Flush)
	}
	if _, counted := l.refused[caller]; !counted && len(l.refused) >= maxCallers {
		caller = netip.Addr{}
	}
	l.refused[caller]++
	return l.refused[caller] <= maxLines
}

// Flush ends the period, and logs how many refusals were not logged in it.
func (l *Log) Flush() {
	l.mu.Lock()
	refused := l.refused
	l.refused = nil
	if l.end != nil {
		l.end.Stop()
	}
	l.mu.Unlock()
	for _, caller := range slices.SortedFunc(maps.Keys(refused), netip.Addr.Compare) {
		leftOut := refused[caller] - maxLines
		if leftOut <= 0 {
			continue
		}
		name := "others"
		if caller.IsValid() {
			name = caller.String()
		}
		l.logger.Warn("refused requests of a caller were not logged, as there were too many within a minute",
			zap.String("remote_addr", name), zap.Int("left_out", leftOut))
	}
}

// RequestID returns Caddy's {http.request.uuid} of r, empty outside of Caddy. Caddy
// generates it on first use, and then adds it to the access log as uuid.
func RequestID(r *http.Request) string {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	id, _ := repl.GetString("http.request.uuid")
	return id
}
