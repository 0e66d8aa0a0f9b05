// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	"cmp"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Log says in a log what the caller of r reads, and who that is: who, or else what err
// knows about it. Whoever answers with err calls it.
func Log(logger *zap.Logger, r *http.Request, err *apierrors.StatusError, who ...zap.Field) {
	fields := []zap.Field{
		zap.String("reason", err.ErrStatus.Message),
		zap.String("code", string(ReasonOf(err))),
		zap.Int32("status", err.ErrStatus.Code),
		zap.String("remote_addr", r.RemoteAddr),
		zap.String("method", r.Method),
		zap.String("host", r.Host),
		zap.String("uri", cmp.Or(r.RequestURI, r.URL.RequestURI())), // what is sent has the latter only
		zap.String("request_id", RequestID(r)),
	}
	if node, user := Of(err); len(who) == 0 && node+user != "" {
		who = []zap.Field{zap.String("node", node), zap.String("user", user)}
	}
	logger.Warn("request refused", append(fields, who...)...)
}

// RequestID returns what Caddy calls r in {http.request.uuid}. It is made when
// first asked for, and is in the access log then, where the field is called uuid.
func RequestID(r *http.Request) string {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	id, _ := repl.GetString("http.request.uuid")
	return id
}
