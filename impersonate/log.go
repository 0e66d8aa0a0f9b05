// SPDX-License-Identifier: Apache-2.0

package impersonate

import "go.uber.org/zap"

// Fields returns the fields that identify id in a log entry.
func (id *Identity) Fields() []zap.Field {
	fields := []zap.Field{
		zap.String("node", id.Node),
		zap.String("user", id.User),
		zap.Strings("groups", id.Groups),
		zap.String("source", string(id.Source)),
	}
	if len(id.HeldBack) > 0 {
		fields = append(fields, zap.Strings("held_back", id.HeldBack))
	}
	return fields
}
