// SPDX-License-Identifier: Apache-2.0

package apistatus

import (
	"cmp"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// Log logs that r is refused with err. who identifies the caller; without it, Log uses
// what [About] added to err. Call it wherever a refusal is written.
func Log(logger *zap.Logger, r *http.Request, err error, who ...zap.Field) {
	message, code := err.Error(), int32(http.StatusInternalServerError)
	if status, ok := From(err); ok {
		message, code = status.Message, status.Code
	}
	fields := []zap.Field{
		zap.String("reason", message),
		zap.String("code", string(ReasonOf(err))),
		zap.Int32("status", code),
		zap.String("remote_addr", r.RemoteAddr),
		zap.String("method", r.Method),
		zap.String("host", r.Host),
		zap.String("uri", cmp.Or(r.RequestURI, r.URL.RequestURI())), // outgoing requests have only the latter
		zap.String("request_id", RequestID(r)),
	}
	if node, user := Of(err); len(who) == 0 && node+user != "" {
		who = []zap.Field{zap.String("node", node), zap.String("user", user)}
	}
	logger.Warn("request refused", append(fields, who...)...)
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
